"""From the loader to the device: all that a step reads, there before it asks.

The random draws and cached features of a batch are made on the host beside it, and all travel together. On a GPU they
lie in pinned memory and are copied on a stream of their own: the host is a step ahead of the device, so that the copy
runs beside the step before, and nobody waits for it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from eclip.config import RunConfig
from eclip.dataloading.schema import Batch
from eclip.objectives.draws import Draws
from eclip.objectives.objective import Objective
from eclip.parallel.ranks import Ranks
from eclip.training.feature_cache.cache import FeatureCache
from eclip.training.step import Part


class Feed:
    """The parts of each step on the device.

    batches: a loader's, in the order of steps and parts. complete: adds draws and cached features to a batch.
    """

    def __init__(self, batches: Iterator[Batch], complete: Callable[[Batch], Part], device: torch.device) -> None:
        self.batches, self.complete, self.device = batches, complete, device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def next(self) -> list[Part]:
        """All parts of the next step, in order. What a stop signal ends in between is lost: it ends the batches too."""
        parts: list[Part] = []
        while True:
            batch = next(self.batches)
            parts.append(self._move(self.complete(batch)))
            if batch.part == batch.parts - 1:
                self._arrive(parts)
                return parts

    def _move(self, part: Part) -> Part:
        if self.stream is None:
            return _map(part, lambda tensor: tensor.to(self.device))
        pinned = _map(part, lambda tensor: tensor if tensor.is_cuda or tensor.is_pinned() else tensor.pin_memory())
        with torch.cuda.stream(self.stream):
            return _map(pinned, lambda tensor: tensor.to(self.device, non_blocking=True))

    def _arrive(self, parts: list[Part]) -> None:
        """Let the step's stream, and not the host, wait for the copies."""
        if self.stream is None:
            return
        own = torch.cuda.current_stream(self.device)
        own.wait_stream(self.stream)
        for part in parts:
            # The memory is the copying stream's: it may be used again only after the step.
            _map(part, lambda tensor: _recorded(tensor, own))


def _recorded(tensor: Tensor, stream: Any) -> Tensor:
    tensor.record_stream(stream)
    return tensor


def _map(part: Part, change: Callable[[Tensor], Tensor]) -> Part:
    cached = None if part.cached is None else part.cached.map(change)
    return Part(part.batch.map(change), cached, part.draws.map(change))


@dataclass
class Completion:
    """Adds to a batch, on the host, what else its step reads."""

    objective: Objective
    config: RunConfig
    cache: FeatureCache | None
    ranks: Ranks
    _drawn: tuple[int, Draws] | None = field(default=None, init=False)
    """The draws of the newest step, which its parts share."""

    def __call__(self, batch: Batch) -> Part:
        """A part of a step."""
        rows = len(batch.product_ids)
        start = batch.part * rows
        draws = self._of_rank(batch.step, rows * batch.parts).rows(start, start + rows)
        cached = None
        if self.cache is not None:
            cached = self.cache.lookup(batch.image_rows, step=batch.step, seed=self.config.seed)
        return Part(batch, cached, draws)

    def _of_rank(self, step: int, rows: int) -> Draws:
        if self._drawn is None or self._drawn[0] != step:
            own = range(self.ranks.rank * rows, (self.ranks.rank + 1) * rows)
            total, seed = rows * self.ranks.world_size, self.config.seed
            self._drawn = step, self.objective.draw(total, own, self.config.model, step=step, seed=seed)
        return self._drawn[1]
