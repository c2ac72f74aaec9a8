"""What a shard's tar holds, by its headers alone: the place of every member, grouped into samples.

A sample is the members that share their folder and the part of their name before the first dot; they need not stand
together. Tars of other programs are taken as they come: long names, `./`, hard links, capital suffixes; folders and
what file managers leave (`.DS_Store`, `._x`, `__MACOSX`) are passed over.

A tar is read to its very end: after the mark that ends it only zeros may follow, whatever their number. Zeros with data
behind them are a hole that a broken download left, or a second tar: tar programs stop there without a word.
"""

import logging
import os
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from ..errors import DataError
from ..file_kinds import HEAD, file_kind

log = logging.getLogger(__name__)

Span = tuple[int, int]
"""Offset and size in a tar, bytes."""

IMAGE_SUFFIXES = frozenset({"jpg", "jpeg", "png", "webp"})
BLOCK = 512  # tar works in blocks of 512 bytes
_RECORD = 20 * BLOCK  # writers fill their tars up to a multiple of it
_CHUNK = _USUAL_PADDING = 1 << 20
_AGAIN = "copy or pack it again"
_ODD = {b"D": "--listed-incremental", b"M": "--multi-volume"}
"""Types of members of tars that hold a part of something: names and places in them mean something else."""


def is_json(suffix: str) -> bool:
    """Whether a member is a product's record, by the part of its name behind the first dot."""
    return suffix.lower() == "json"


def is_image(suffix: str) -> bool:
    """Whether a member is an image, likewise."""
    return suffix.rpartition(".")[2].lower() in IMAGE_SUFFIXES


def read_samples(file: BinaryIO, path: Path) -> dict[str, dict[str, Span]]:
    """Samples by key, in the order of their first members: the span of each member by the rest of its name.

    file: the tar, opened; path: names it in errors. Raises DataError for a tar that is truncated, damaged, compressed
    or has a hole, and for members whose bytes cannot be read where they stand.
    """
    size = os.fstat(file.fileno()).st_size
    samples: dict[str, dict[str, Span]] = {}
    spans: dict[str, Span] = {}
    for info in _members(file, path, size):
        if program := _ODD.get(info.type):
            raise DataError(f"{path}: written by tar {program}, which is not read here; write it without that")
        name = _name(info.name)
        if info.isfile():
            spans[name] = (info.offset_data, info.size)
        folder, _, base = name.rpartition("/")
        stem, _, suffix = base.partition(".")
        if not (info.isfile() or info.islnk() or info.issym()) or _is_clutter(name):
            continue
        members = samples.setdefault(f"{folder}/{stem}" if folder else stem, {})
        if suffix in members:
            raise DataError(
                f"{path}: {name!r} occurs twice, at bytes {members[suffix][0]} and {info.offset_data} (tar -r and -u "
                f"append a second one); pack it again"
            )
        if is_json(suffix) or is_image(suffix) or info.isfile():
            members[suffix] = _span(info, name, spans, path)
    return {key: held for key, held in samples.items() if any(is_json(s) or is_image(s) for s in held)}


def _span(info: tarfile.TarInfo, name: str, spans: dict[str, Span], path: Path) -> Span:
    """Where a member's bytes lie: those of the member it is a hard link to, if it is one."""
    if info.issym():
        raise DataError(
            f"{path}: {name!r} is a symbolic link to {info.linkname!r}; a shard holds the files themselves: "
            f"write it with tar --dereference"
        )
    if info.issparse():
        raise DataError(f"{path}: {name!r} is stored sparse, in pieces; write the tar without --sparse")
    if info.islnk() and _name(info.linkname) not in spans:
        raise DataError(
            f"{path}: {name!r} is a hard link to {info.linkname!r}, which does not stand before it in this tar; "
            f"write it with tar --hard-dereference"
        )
    return spans[_name(info.linkname) if info.islnk() else name]


def _name(name: str) -> str:
    """A member's name without `./`; bytes that are not UTF-8, and what would break a line of a message, as \\xNN."""
    readable = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    if not readable.isprintable():
        readable = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in readable)
    while readable.startswith("./"):
        readable = readable[2:].lstrip("/")
    return readable


def _is_clutter(name: str) -> bool:
    """What operating systems and archivers add: hidden files, resource forks, extended headers as files."""
    *folders, base = name.split("/")
    hidden = any(part.startswith(".") and part != ".." for part in (*folders, base))
    return hidden or any(part == "__MACOSX" or part.startswith("PaxHeader") for part in folders)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Name the tar in whatever tarfile or the disk raise."""
    try:
        yield
    except (tarfile.TarError, UnicodeError, OverflowError) as error:
        raise DataError(f"{path}: not a whole tar ({error}): truncated or damaged, {_AGAIN}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); {_AGAIN}") from error


def _members(file: BinaryIO, path: Path, size: int) -> Iterator[tarfile.TarInfo]:
    """Every member of the tar, its data within the file; then the end is checked."""
    with _readable(path):
        head = file.read(HEAD)
    if not head:
        raise DataError(f"{path}: truncated at 0 bytes, an empty file; {_AGAIN}")
    file.seek(0)
    last = None
    with _readable(path):
        if (kind := file_kind(head)) and head.strip(b"\0"):
            raise DataError(f"{path}: not a whole tar: it is {kind}; images are read by their place in a plain tar")
        tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115  the caller's file is all it holds
        while (info := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # a kilobyte for each
            end = info.offset_data + info.size
            if info.isfile() and not info.issparse() and end > size:
                raise DataError(f"{path}: truncated at {size} bytes, {info.name!r} ends at byte {end}; {_AGAIN}")
            last = info
            yield info
        _check_end(file, path, tar.offset, size, last)


def _check_end(file: BinaryIO, path: Path, end: int, size: int, info: tarfile.TarInfo | None) -> None:
    """Raise DataError unless zeros alone follow the last member, `info`: a block of them or more."""
    last = repr(info.name) if info else "its beginning"
    file.seek(end)
    block = file.read(BLOCK)
    if len(block) < BLOCK:
        raise DataError(f"{path}: truncated at {size} bytes, after {last} (no end-of-archive mark); {_AGAIN}")
    if any(block):
        raise DataError(f"{path}: damaged header at byte {end}, after {last}; the rest is unreadable, {_AGAIN}")
    at = _first_nonzero(file, end + BLOCK)
    if at is not None:
        file.seek(at)
        raise DataError(
            f"{path}: zeros at byte {end}, after {last}, and data again at byte {at}: {_why(file.read(BLOCK))}"
        )
    if end == 0 and size > _RECORD:
        raise DataError(f"{path}: empty: {size} bytes of zeros, as a download that never began; {_AGAIN}")
    if size - end > _RECORD + 2 * BLOCK and info and _ends_in_zeros(file, info):
        raise DataError(
            f"{path}: {last} ends in zeros, and so does the tar, its last {size - end} bytes: a download that was cut; "
            f"{_AGAIN}"
        )
    if size - end > _USUAL_PADDING:
        log.warning(
            "%s: the last %d bytes are zeros, after %s: if its download was cut, products are missing",
            path, size - end, last,
        )  # fmt: skip


def _ends_in_zeros(file: BinaryIO, info: tarfile.TarInfo) -> bool:
    """Whether a record's or an image's last bytes are missing: all their formats end otherwise."""
    suffix = info.name.rpartition("/")[2].partition(".")[2]
    if not (info.isfile() and info.size >= 16 and (is_json(suffix) or is_image(suffix))):
        return False
    file.seek(info.offset_data + info.size - 16)
    return not any(file.read(16))


def _first_nonzero(file: BinaryIO, start: int) -> int | None:
    """The first block with a byte that is not zero, from `start` on."""
    file.seek(start)
    zeros = bytes(_CHUNK)
    while chunk := file.read(_CHUNK):
        if chunk != zeros[: len(chunk)]:
            return start + (len(chunk) - len(chunk.lstrip(b"\0"))) // BLOCK * BLOCK
        start += len(chunk)
    return None


def _why(block: bytes) -> str:
    """What a tar with data behind its end is."""
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return f"a hole, as a broken download or copy leaves it; {_AGAIN}"
    return (
        "a hole, as a broken download leaves it, or two tars put one behind the other (cat); download it again, or "
        "give each tar its own number"
    )
