"""What file.py asks of a disk: room before the work, locks that die with their holder, no half array."""

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

Notes = dict[int, str]
"""Item -> what is to be said about it."""

DTYPE = np.dtype(np.float16)
_PROBES, _PROBED_VALUES = 1024, 1024  # items, values of each


def damage(path: Path, shape: tuple[int, ...]) -> str:
    """What is wrong with a finished array of this shape; "" for a sound one, and where there is none.

    Reading a map of a file that is too short would be SIGBUS.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        return ""
    except (ValueError, EOFError) as error:  # no header, or fewer bytes than it says
        return str(error).partition("\n")[0]
    if not isinstance(array, np.memmap) or array.shape != shape or array.dtype != DTYPE:
        return f"holds {array.dtype} {array.shape}, not {DTYPE} {shape}"
    if (size := path.stat().st_size) != array.offset + array.nbytes:
        return f"{size} bytes instead of {array.offset + array.nbytes}"
    # A copy that allocates first leaves zeros, which no tower gives. Probing every item would read a whole disk.
    probes = np.unique(np.linspace(0, len(array) - 1, _PROBES).round().astype(np.int64))
    written = array.reshape(len(array), -1)[probes, :_PROBED_VALUES].any(1)
    return "" if written.all() else f"item {probes[~written][0]} was never written"


def allocate(descriptor: int, size: int) -> None:
    """Give a file its disk space now: a full disk is then an error before the work instead of SIGBUS in its middle."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.ENODEV):
            raise
        disk = os.fstatvfs(descriptor)  # a disk that reserves nothing can still be asked
        if disk.f_bavail * disk.f_frsize < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from None
        os.ftruncate(descriptor, size)


@contextlib.contextmanager
def byte_lock(record: int, place: int, *, wait: bool) -> Iterator[bool]:
    """Hold the lock of one byte of the record; without `wait`, False when another process has it."""
    try:
        fcntl.lockf(record, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, place)
    except (BlockingIOError, PermissionError):  # EAGAIN or EACCES, by file system
        yield False
        return
    try:
        yield True
    finally:
        fcntl.lockf(record, fcntl.LOCK_UN, 1, place)


def write_all(descriptor: int, data: memoryview, offset: int) -> None:
    """pwrite may write less than it was given."""
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


def append_notes(path: Path, notes: Notes) -> None:
    """Add to a file that several processes add to."""
    # The line break comes first too: the last writer may have been killed in the middle of a line.
    lines = "".join("\n" + json.dumps({"item": item, "note": note}) for item, note in notes.items()) + "\n"
    with path.open("ab", buffering=0) as file:
        file.write(lines.encode())
        os.fsync(file.fileno())


def read_notes(path: Path) -> Notes:
    """All notes of a file, by item; none where there is no file. A line that a kill cut off was written again later."""
    notes: Notes = {}
    with contextlib.suppress(FileNotFoundError):
        for line in path.read_text(encoding="utf-8").split("\n"):
            with contextlib.suppress(json.JSONDecodeError):
                found = json.loads(line)
                notes[found["item"]] = found["note"]
    return dict(sorted(notes.items()))


def in_bytes(count: int) -> str:
    """A number of bytes for people."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
