"""One process at a time: two runs started together want the same shards, the same feature cache, the same run folder.

The lock is the kernel's (flock): a process that dies lets go of it, and a lock file left behind means nothing.
"""

import contextlib
import errno
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger(__name__)


@contextlib.contextmanager
def alone(path: Path, *, busy: str | None = None) -> Iterator[None]:
    """Hold the lock file `path`, made if absent, for the length of the block.

    busy: the refusal when another process has it, "{holder}" in it is replaced by who that is; None waits instead, and
    says so in the log. Raises ValueError with `busy`, OSError where the file cannot be made. File systems without
    locks (Lustre mounted without flock, some NFS) are gone on without one, which the log says.
    """
    with open(path, "a+", encoding="utf-8") as lock:
        locked = _acquire(lock.fileno(), path, busy)
        try:
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            lock.flush()
            yield
        finally:
            if locked:
                # Unlocked rather than only closed: workers forked meanwhile hold the same open file.
                fcntl.flock(lock.fileno(), fcntl.LOCK_UN)


def _acquire(descriptor: int, path: Path, busy: str | None) -> bool:
    """Lock the open file; False where its file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        if busy is not None:
            raise ValueError(busy.replace("{holder}", _holder(path))) from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        log.warning("%s: no locks on this file system (%s): let one process at a time write there", path.parent, error)
        return False
    log.info("%s: waiting for %s", path, _holder(path))
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return True


def _holder(path: Path) -> str:
    """Who wrote the lock file last; it may be another one by now, so this is for messages alone."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip() or "another process"
    except OSError:
        return "another process"
