"""Questions of many clients in one pass of the model.

One thread asks the model. What arrives while it is busy waits and is asked together next: a lone question waits for
nobody, and the busier the server, the larger its batches.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

from eclip.serve.limits import busy

Asked = TypeVar("Asked")
Answered = TypeVar("Answered")
T = TypeVar("T")


@dataclass(frozen=True)
class _Item:
    """What waits: a question, or other work."""

    future: "Future[Any]"
    question: Any = None
    work: Callable[[], Any] | None = None


class Batcher(Generic[Asked, Answered]):
    """A thread that answers questions in batches, and runs other work of the model between them, in order."""

    def __init__(
        self,
        answer: Callable[[Sequence[Asked]], Sequence[Answered]],
        *,
        most: int = 32,
        pending: int = 256,
        window: float = 0.0,
    ) -> None:
        """answer: from questions to as many answers. most: of a batch. pending: that may wait; one more is refused.

        window: seconds that a batch which is not full waits for more.
        """
        self._answer, self._most, self._pending, self._window = answer, most, pending, window
        self._waiting: deque[_Item] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self.batches: deque[int] = deque(maxlen=1000)
        """Sizes of the last batches."""
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    def submit(self, question: Asked) -> "Future[Answered]":
        """Its answer, some time; cancel it, and it is not asked any more. Raises Refusal (503) when too many wait."""
        return self._enqueue(_Item(Future(), question=question))

    def call(self, work: Callable[[], T]) -> "Future[T]":
        """Other work of the model; as `submit`."""
        return self._enqueue(_Item(Future(), work=work))

    def close(self, timeout: float = 10.0) -> None:
        """Answer what waits, and end the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout)

    def _enqueue(self, item: _Item) -> "Future[Any]":
        with self._changed:
            if self._closing:
                raise busy("it is being stopped")
            if len(self._waiting) >= self._pending:
                raise busy(f"{self._pending} questions wait already")
            self._waiting.append(item)
            self._changed.notify()
        return item.future

    def _run(self) -> None:
        while (taken := self._take()) is not None:
            if (work := taken[0].work) is not None:
                _settle(taken[0].future, work)
                continue
            self.batches.append(len(taken))
            try:
                answers = self._answer([item.question for item in taken])
                assert len(answers) == len(taken)
            except BaseException:  # a panic of a Rust library is no Exception, and this thread has no successor
                # One of them fails the others: alone each gets its own answer or error.
                for item in taken:
                    _settle(item.future, partial(self._alone, item.question))
            else:
                for item, answer in zip(taken, answers, strict=True):
                    item.future.set_result(answer)

    def _alone(self, question: Asked) -> Answered:
        return self._answer([question])[0]

    def _take(self) -> list[_Item] | None:
        """The next batch of questions, or one piece of work; None at the end."""
        with self._changed:
            while True:
                while not self._waiting and not self._closing:
                    self._changed.wait()
                if not self._waiting:
                    return None
                self._gather()
                taken: list[_Item] = []
                while self._waiting and len(taken) < self._most:
                    if taken and (self._waiting[0].work or taken[0].work):
                        break
                    item = self._waiting.popleft()
                    if item.future.set_running_or_notify_cancel():
                        taken.append(item)
                if taken:
                    return taken

    def _gather(self) -> None:
        """Wait for a batch to fill, for as long as the window."""
        deadline = time.monotonic() + self._window
        while len(self._waiting) < self._most and not self._closing:
            left = deadline - time.monotonic()
            if left <= 0 or any(item.work for item in self._waiting):
                return
            self._changed.wait(left)


def _settle(future: "Future[Any]", compute: Callable[[], Any]) -> None:
    """Give a future its result, or its error."""
    try:
        future.set_result(compute())
    except BaseException as error:
        future.set_exception(error if isinstance(error, Exception) else RuntimeError(repr(error)))
