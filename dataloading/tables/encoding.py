"""The lines of a text file in whatever encoding it has, with errors that name the line."""

import codecs
import io
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_HEAD = 4096
_CHUNK = 1 << 16
_MARKS = (  # UTF-32 before UTF-16: one's little-endian mark begins with the other's
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_FOREIGN = (
    (b"PK\x03\x04", "a spreadsheet (.xlsx, .ods) or a zip archive"),
    (b"\xd0\xcf\x11\xe0", "an old Excel workbook (.xls)"),
    (b"\x1f\x8b", "compressed by gzip"),
    (b"BZh", "compressed by bzip2"),
    (b"\xfd7zXZ\0", "compressed by xz"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd"),
    (b"7z\xbc\xaf", "a 7z archive"),
    (b"PAR1", "a Parquet file"),
    (b"ARROW1", "an Arrow file"),
    (b"SQLite format 3", "a SQLite database"),
    (b"%PDF", "a PDF"),
    (b"\x89PNG", "an image"),
    (b"\xff\xd8\xff", "an image"),
    (b"<!doctype", "a web page"),
    (b"<html", "a web page"),
    (b"<?xml", "XML"),
)


@dataclass(frozen=True)
class TextFile:
    """A file and the codec of its text; `named` is the encoding as messages have it."""

    path: Path
    codec: str
    named: str

    def lines(self) -> Iterator[str]:
        """Lines with their ends, which are \\n, \\r\\n or \\r. Raises ValueError naming an undecodable line."""
        with self.path.open(encoding=self.codec, newline="") as lines:
            try:
                yield from lines
            except UnicodeError as error:
                raise ValueError(self._undecodable(error)) from error

    def _undecodable(self, error: UnicodeError) -> str:
        line, found = 1, f"{error}"
        decoder = codecs.getincrementaldecoder(self.codec)()
        last = ""
        with self.path.open("rb") as data:
            for chunk in iter(lambda: data.read(_CHUNK), b""):
                state = decoder.getstate()
                try:
                    pieces = [decoder.decode(chunk)]
                except UnicodeError:
                    decoder.setstate(state)
                    pieces = list(_until_error(decoder, chunk))
                for text in filter(None, pieces):
                    line += text.count("\n") + text.count("\r") - (last + text).count("\r\n")
                    last = text[-1]
        if isinstance(error, UnicodeDecodeError) and error.start < len(error.object):
            found = f"byte 0x{error.object[error.start]:02x} ({error.reason})"
        return (
            f"{self.path}, line {line}: {found} is not {self.named}; name the table's encoding, such as "
            "--encoding cp1252 (Western European Excel), mac_roman (Excel on a Mac), gb18030 (Chinese) or cp932"
        )


def _until_error(decoder: codecs.IncrementalDecoder, chunk: bytes) -> Iterator[str]:
    try:
        for byte in chunk:
            yield decoder.decode(bytes([byte]))
    except UnicodeError:
        return


def stamp_of(path: Path) -> tuple[int, int]:
    """Size and time of the last change: what differs when a file was written meanwhile."""
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns


def open_text(path: Path, encoding: str | None = None) -> TextFile:
    """A readable text file, its encoding by its byte order mark, else as given, else UTF-8.

    Raises ValueError when it cannot be read, is empty, is of another kind whatever its name, when the encoding is
    unknown or contradicts the mark, and for UTF-16 without a mark.
    """
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):
            kind = "a folder" if stat.S_ISDIR(mode) else "not a file on disk, which can be read twice"
            raise ValueError(f"{path}: {kind}; expected a table")
        with path.open("rb") as data:
            head = data.read(_HEAD)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    if not head.strip(b"\xef\xbb\xbf\xff\xfe \t\r\n"):
        raise ValueError(f"{path}: empty; expected a table whose first line names the columns")
    for magic, kind in _FOREIGN:
        if head.lower().startswith(magic.lower()):
            raise ValueError(f"{path}: {kind}, whatever its name; unpack it, or save the table as CSV in UTF-8")
    mark = next((codec for mark, codec in _MARKS if head.startswith(mark)), None)
    if encoding is not None:
        return _given(path, encoding, mark)
    if mark is None:
        _check_zeros(path, head)
    codec = mark or "utf-8-sig"
    return TextFile(path, codec, codec.upper().removesuffix("-SIG"))


def _given(path: Path, encoding: str, mark: str | None) -> TextFile:
    try:
        io.TextIOWrapper(io.BytesIO(), encoding=encoding)  # knows which codecs are of text
        name = codecs.lookup(encoding).name
    except (LookupError, ValueError):
        known = "utf-8, utf-16, cp1252, iso-8859-1, gb18030, cp932"
        raise ValueError(f"--encoding {encoding!r}: unknown to Python; expected a name such as {known}") from None
    if mark is None:
        return TextFile(path, "utf-8-sig" if name == "utf-8" else name, encoding)
    family = mark.removesuffix("-sig")
    if not name.startswith(family):
        raise ValueError(
            f"{path}: begins with the byte order mark of {family.upper()}, which contradicts --encoding {encoding}; "
            "leave --encoding out"
        )
    return TextFile(path, mark, family.upper())


def _check_zeros(path: Path, head: bytes) -> None:
    zeros = head.count(0)
    if zeros == len(head):
        raise ValueError(f"{path}: begins with {zeros} zero bytes: not a table, or a download that never finished")
    if zeros * 8 < len(head):
        return  # an odd one: its row is rejected
    big, little = head[::2].count(0), head[1::2].count(0)
    if max(big, little) < 4 * min(big, little):
        raise ValueError(f"{path}: {zeros} zero bytes near its begin: a part of the file was lost, or never written")
    raise ValueError(
        f"{path}: every other byte is zero, as in UTF-16, and no byte order mark says so; "
        f"give --encoding utf-16-{'le' if little > big else 'be'}"
    )
