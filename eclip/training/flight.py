"""The numbers of a step on their way to the host, which does not wait for them.

A read of a device value stops the host until the device has done all it was told; the device then idles until it is
told more. So the numbers of a step are copied to pinned memory and read two steps later, when they have long been
there, or all at once at a log line. On a CPU they are there at once.
"""

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


@dataclass(frozen=True)
class _Sent:
    step: int
    keys: Sequence[str]
    learning_rate: float
    names: tuple[str, ...]
    values: Tensor
    arrival: "torch.cuda.Event | None"


class InFlight:
    """Numbers of recent steps, first in first out."""

    def __init__(self) -> None:
        self._sent: deque[_Sent] = deque()

    def send(
        self, step: int, keys: Sequence[str], learning_rate: float, names: Sequence[str], means: Tensor, own: Tensor
    ) -> None:
        """Start the copy of a step's numbers; means, own: (n,) on the device, in the order of `names`."""
        values = torch.stack([means, own])
        arrival = None
        if values.is_cuda:
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            values = host.copy_(values, non_blocking=True)
            arrival = torch.cuda.Event()
            arrival.record()
        self._sent.append(_Sent(step, keys, learning_rate, tuple(names), values, arrival))

    def arrived(self, *, everything: bool) -> Iterator[Record]:
        """Records in order. everything: wait for all; otherwise for those that are LAG steps old, on every rank alike."""
        while self._sent and (everything or self._sent[0].arrival is None or len(self._sent) > LAG):
            sent = self._sent.popleft()
            if sent.arrival is not None:
                sent.arrival.synchronize()
            means, own = (dict(zip(sent.names, row, strict=True)) for row in sent.values.tolist())
            yield Record(sent.step, sent.keys, sent.learning_rate, means, own)
