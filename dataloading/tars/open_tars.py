"""Reading the bytes of members by their place, from any thread, with as many tars open as the system allows.

A tar that was cut, exchanged or deleted since its index was built is at fault, not the image that lay in it: DataError.
"""

import errno
import os
import resource
import sys
import tarfile
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import DataError
from .members import BLOCK

_MOST = 256
_RETRIED = (errno.ESTALE, errno.EIO)  # network stores recover from these when the file is opened again
Stamp = tuple[int, int]
"""Size in bytes and time of change in nanoseconds, of a tar when its index was built."""


class _File:
    """An open file that closes with its last user: a thread may read one that others have let go."""

    def __init__(self, path: Path):
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)


def most_open() -> int:
    """Half of the files that this process may still open (`ulimit -n`), 256 at most and one at least."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return _MOST
    try:
        used = len(os.listdir("/proc/self/fd" if sys.platform == "linux" else "/dev/fd"))
    except OSError:
        used = soft // 2
    return max(1, min(_MOST, (soft - used) // 2))


class OpenTars:
    """The tars of a split. `read` may be called from threads and after a fork."""

    def __init__(self, paths: Sequence[Path], stamps: Sequence[Stamp]):
        self.paths, self.stamps = tuple(paths), tuple(stamps)
        self._files: OrderedDict[int, _File] = OrderedDict()
        self._limit: int | None = None
        self._lock = threading.Lock()

    def read(self, shard: int, offset: int, size: int, what: str) -> bytes:
        """`size` bytes from `offset` on of a tar; `what` names them in errors. Raises DataError."""
        try:
            data = self._read(shard, offset, size, what)
        except OSError as error:
            raise DataError(
                f"{self.paths[shard]}: {what} cannot be read ({error.strerror or error}); the tar was there when its "
                f"index was read: see to the disk or store, then go on with --resume"
            ) from error
        if len(data) < size:
            raise self._changed(shard, f"{what} has {len(data)} of its {size} bytes at byte {offset}")
        return data

    def _read(self, shard: int, offset: int, size: int, what: str) -> bytes:
        """What there is of the bytes; of an error that may pass, after a second try with the file opened again."""
        try:
            return self._pread(self._file(shard, offset, size, what), offset, size)
        except OSError as error:
            if error.errno not in _RETRIED:
                raise
        with self._lock:
            self._files.pop(shard, None)
        return self._pread(self._file(shard, offset, size, what), offset, size)

    @staticmethod
    def _pread(file: _File, offset: int, size: int) -> bytes:
        parts = []
        while size and (part := os.pread(file.fd, size, offset)):
            parts.append(part)
            offset, size = offset + len(part), size - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _file(self, shard: int, offset: int, size: int, what: str) -> _File:
        with self._lock:
            file = self._files.pop(shard, None)
            if file is None:
                file = self._opened(shard)
                self._check(shard, file, offset, size, what)
            self._files[shard] = file
            if self._limit is None:
                self._limit = most_open()
            while len(self._files) > self._limit:
                self._files.popitem(last=False)
            return file

    def _opened(self, shard: int) -> _File:
        """Open a tar; with no file left to open, let go of half of ours until there is one."""
        while True:
            try:
                return _File(self.paths[shard])
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE):
                    raise
                if not self._files:
                    raise DataError(
                        f"{self.paths[shard]}: this process may open no more files; raise the limit (ulimit -n), or "
                        f"use fewer --num-workers"
                    ) from error
                self._limit = max(1, len(self._files) // 2)
                for _ in range(max(1, len(self._files) - self._limit)):
                    self._files.popitem(last=False)

    def _check(self, shard: int, file: _File, offset: int, size: int, what: str) -> None:
        """Raise DataError for another tar than the index was built of."""
        status = os.fstat(file.fd)
        bytes_then, changed_then = self.stamps[shard]
        if status.st_size != bytes_then:
            raise self._changed(shard, f"{what} was to be read from a tar of {bytes_then} bytes")
        # Some stores tell a time of change that changes by itself: the member's header decides.
        if status.st_mtime_ns != changed_then and not _holds(file.fd, offset, size):
            raise self._changed(shard, f"{what} is not at byte {offset} any more")

    def _changed(self, shard: int, how: str) -> DataError:
        path = self.paths[shard]
        try:
            now = f"{os.stat(path).st_size} bytes now"
        except OSError as error:
            now = error.strerror or "gone"
        return DataError(
            f"{path}: {how}: the tar was truncated or replaced since its index was built, when it had "
            f"{self.stamps[shard][0]} bytes ({now}); put it back and go on with --resume, or start a new run"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {"paths": self.paths, "stamps": self.stamps}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


def _holds(fd: int, offset: int, size: int) -> bool:
    """Whether the block before `offset` is the header of a member of `size` bytes."""
    try:
        return tarfile.TarInfo.frombuf(os.pread(fd, BLOCK, offset - BLOCK), "utf-8", "surrogateescape").size == size
    except tarfile.HeaderError:
        return False
