"""Waits that name themselves: a time limit on every batch, whoever makes it.

A wait is cut into slices, in Python: a signal handler that raises ends it at once, wherever the work itself stands.
"""

import queue
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

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
    """Runs one function in a thread, a call at a time, so that the caller's wait for it has a limit.

    work: called in the thread for each `take`. what: names it in the error. setup: called first in the thread.
    """

    def __init__(
        self, work: Callable[[], T], *, what: Callable[[], str], stall_seconds: float, setup: Callable[[], None]
    ):
        self.what, self.stall_seconds = what, stall_seconds
        self._asked: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()
        # A daemon: a call that never returns must not keep the program from ending.
        threading.Thread(
            target=_answer, args=(work, setup, self._asked, self._done), name="batches", daemon=True
        ).start()

    def take(self) -> T:
        """The result of one call, or its error. Raises DataError when it takes longer than the limit."""
        self._asked.put(True)
        result: list[tuple[T | None, BaseException | None]] = []

        def ready(seconds: float) -> bool:
            try:
                result.append(self._done.get(timeout=seconds))
            except queue.Empty:
                return False
            return True

        if not wait_for(ready, self.stall_seconds):
            raise DataError(self.what())
        value, error = result[0]
        if error is not None:
            try:
                raise error
            finally:
                del error, result  # the traceback refers to this frame
        return value  # type: ignore[return-value]

    def close(self) -> None:
        """Let the thread end, after the call it may stand in."""
        self._asked.put(False)


def _answer(
    work: Callable[[], T],
    setup: Callable[[], None],
    asked: "queue.SimpleQueue[bool]",
    done: "queue.SimpleQueue[tuple[T | None, BaseException | None]]",
) -> None:
    setup()
    while asked.get():
        try:
            done.put((work(), None))
        except BaseException as error:
            done.put((None, error))
