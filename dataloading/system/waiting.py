"""Waits that name themselves: a time limit on every batch, whoever makes it.

A wait is cut into slices, in Python: a signal handler that raises ends it at once, wherever the work itself stands.
"""

import atexit
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from ..errors import DataError

T = TypeVar("T")
_SLICE = 1.0  # seconds


def wait_for(ready: Callable[[float], bool], limit: float) -> bool:
    """Call ready(seconds) again and again until it says so; False after `limit` seconds (0: wait for ever).

    Seconds in which this process itself was stopped (a suspended job) do not count.
    """
    span = min(_SLICE, limit or _SLICE)
    waited = 0.0
    while not limit or waited < limit:
        start = time.monotonic()
        if ready(span):
            return True
        waited += min(time.monotonic() - start, 2 * span)
    return False


class Beside(Generic[T]):
    """Calls one function again and again in a thread, `ahead` results beyond those taken; a wait for one has a limit.

    work: called in the thread; its first error is the last result. what: names the result waited for, in the error of a
    wait that is too long. setup: called first in the thread, and teardown last, when it has been closed. stop: has a
    call that is under way end soon. hangs: whether it stands where nobody knows for how long.
    """

    def __init__(
        self,
        work: Callable[[], T],
        *,
        ahead: int,
        what: Callable[[], str],
        stall_seconds: float,
        setup: Callable[[], None] = lambda: None,
        teardown: Callable[[], None] = lambda: None,
        stop: Callable[[], None] = lambda: None,
        hangs: Callable[[], bool] = lambda: False,
    ):
        self.what, self.stall_seconds, self._stop, self._hangs = what, stall_seconds, stop, hangs
        self._shared = _Shared[T](threading.Semaphore(ahead), queue.SimpleQueue(), threading.Event())
        # A daemon: a call that never returns must not keep the program from ending.
        self._thread = threading.Thread(
            target=_work_ahead, args=(work, setup, teardown, self._shared), name="batches", daemon=True
        )
        _living[self._shared] = self
        self._thread.start()
        # Exit functions run last registered first: before those of the libraries that the thread works with.
        atexit.unregister(_end_all)
        atexit.register(_end_all)

    def take(self) -> T:
        """The next result, or the error in its place. Raises DataError when it does not come within the limit."""
        result: list[tuple[T | None, BaseException | None]] = []

        def ready(seconds: float) -> bool:
            try:
                result.append(self._shared.done.get(timeout=seconds))
            except queue.Empty:
                return False
            return True

        if not wait_for(ready, self.stall_seconds):
            raise DataError(self.what())
        self._shared.room.release()
        value, error = result[0]
        if error is not None:
            try:
                raise error
            finally:
                del error, result  # the traceback refers to this frame
        return value  # type: ignore[return-value]

    def close(self) -> None:
        """Have the thread end after the call it may stand in; nobody waits for it, and what it made is dropped."""
        self._shared.closed.set()
        self._shared.room.release()
        self._stop()

    def end(self) -> None:
        """Close it and wait for its end, unless it hangs."""
        self.close()
        until = time.monotonic() + _LONGEST_CALL
        while self._thread.is_alive() and not self._hangs() and time.monotonic() < until:
            self._thread.join(0.05)


@dataclass(frozen=True, eq=False)
class _Shared(Generic[T]):
    """Between a `Beside` and its thread."""

    room: threading.Semaphore
    done: "queue.SimpleQueue[tuple[T | None, BaseException | None]]"
    closed: threading.Event


def _work_ahead(
    work: Callable[[], T], setup: Callable[[], None], teardown: Callable[[], None], shared: _Shared[T]
) -> None:
    try:
        setup()
        while shared.room.acquire() and not shared.closed.is_set():
            shared.done.put((work(), None))
    except BaseException as error:
        shared.done.put((None, error))
    try:
        shared.closed.wait()
        teardown()
    finally:
        del _living[shared]


_living: "dict[_Shared[Any], Beside[Any]]" = {}
"""Those whose threads have not ended."""
_LONGEST_CALL = 60.0  # seconds: a batch of DALI's took more than 5 on two cores that twelve processes wanted


def _end_all() -> None:
    """At the exit: a daemon that wants the interpreter back from C++ code when that is gone aborts the program."""
    living = list(_living.values())
    for beside in living:
        beside.close()
    for beside in living:
        beside.end()
