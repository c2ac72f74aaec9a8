"""The numbers of a step on their way to the host, which does not wait for them.

A read of a device value stops the host until the device has done all it was told; the device then idles until it is
told more. So the numbers of a step are copied to pinned memory and read two steps later, when they have long been
there, or all at once at a log line. On a CPU they are there at once.
"""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LAG = 2
"""Steps that a GPU may be behind the host. More would pile up batches in its memory."""


@dataclass(frozen=True)
class Record:
    """The numbers of one step."""

    step: int
    """Steps that were done before it."""
    keys: Sequence[str]
    """Of this rank's images."""
    learning_rate: float
    means: dict[str, float]
    """Over ranks."""
    own: dict[str, float]
    """This rank's."""
    finite: bool
    """Whether the step was taken; otherwise the device skipped it."""


@dataclass(frozen=True)
class _Sent:
    step: int
    keys: Sequence[str]
    learning_rate: float
    names: tuple[str, ...]
    values: Tensor
    observed: int
    arrival: "torch.cuda.Event | None"


class InFlight:
    """Numbers of recent steps, first in first out."""

    def __init__(self) -> None:
        self._sent: deque[_Sent] = deque()

    def send(
        self,
        step: int,
        keys: Sequence[str],
        learning_rate: float,
        names: Sequence[str],
        means: Tensor,
        own: Tensor,
        *,
        observed: int = 0,
    ) -> Tensor:
        """Start the copy of a step's numbers; means, own: (n,) on the device, in the order of `names`.

        Returns whether the step is to be taken, 0-dim bool on the device: whether its means are finite. observed: how
        many numbers, the last ones, have no say in that: a step must not depend on what a log line looks at.
        """
        decisive = len(names) - observed
        values = torch.stack([means, own])
        arrival = None
        if values.is_cuda:
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            values = host.copy_(values, non_blocking=True)
            arrival = torch.cuda.Event()
            arrival.record()
        self._sent.append(_Sent(step, keys, learning_rate, tuple(names), values, observed, arrival))
        return means[:decisive].isfinite().all()

    def arrived(self, *, everything: bool) -> Iterator[Record]:
        """Records in order. everything: wait for all; otherwise for those LAG steps old, on every rank alike."""
        while self._sent and (everything or self._sent[0].arrival is None or len(self._sent) > LAG):
            sent = self._sent.popleft()
            if sent.arrival is not None:
                sent.arrival.synchronize()
            means, own = (dict(zip(sent.names, row, strict=True)) for row in sent.values.tolist())
            decisive = list(means.values())[: len(means) - sent.observed]
            finite = all(math.isfinite(value) for value in decisive)
            yield Record(sent.step, sent.keys, sent.learning_rate, means, own, finite)
