"""Batches decoded by Pillow, in worker processes or in this one."""

import dataclasses
import math
import pickle

import torch

from .pipeline import PREFETCH, Bad, BatchSource
from .schema import Batch
from .system.workers import Slot, Workers


def _shape(rows: int, size: int) -> tuple[int, ...]:
    return rows, 2, 3, size, size


class TorchPipeline:
    """Batches from number `first` on, decoded by `num_workers` processes, in the order of steps and parts."""

    def __init__(self, source: BatchSource, *, first: int, num_workers: int, stall_seconds: float):
        self.source, parts = source, source.sampler.parts
        self._workers = Workers(
            self._make,
            first=first,
            count=num_workers,
            ahead=PREFETCH,
            slot_bytes=math.prod(_shape(parts.most_rows, source.image_size)),
            stall_seconds=stall_seconds,
            name=parts.name,
        )

    def _make(self, number: int, slot: Slot) -> bytes:
        batch, bad = self.source.decoded(*self.source.sampler.parts.place(number))
        assert batch.images is not None
        slot[: batch.images.numel()] = batch.images.numpy().ravel()
        rest = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch) if f.name != "images"}
        arrays = {name: value.numpy() for name, value in rest.items() if isinstance(value, torch.Tensor)}
        return pickle.dumps((rest | arrays, list(arrays), bad), protocol=5)

    def _unpack(self, rest: bytes, slot: Slot) -> tuple[Batch, Bad]:
        values, arrays, bad = pickle.loads(rest)
        tensors = {name: torch.from_numpy(values[name]) for name in arrays}
        shape = _shape(len(values["image_rows"]), self.source.image_size)
        images = torch.from_numpy(slot[: math.prod(shape)]).view(shape).clone()
        return Batch(**{**values, **tensors, "images": images}), bad

    def __next__(self) -> tuple[Batch, Bad]:
        """The next batch and the undecodable images met in it."""
        return self._workers.take(self._unpack)

    def close(self) -> None:
        """End the workers."""
        self._workers.close()


class InPlace:
    """Batches from number `first` on, made by this process when they are asked for; decoded=False leaves images out."""

    def __init__(self, source: BatchSource, *, first: int, decoded: bool):
        self.source, self.number, self.decoded = source, first, decoded

    def __next__(self) -> tuple[Batch, Bad]:
        """The next batch and the undecodable images met in it."""
        step, part = self.source.sampler.parts.place(self.number)
        self.number += 1
        return self.source.decoded(step, part) if self.decoded else (self.source.without_images(step, part), {})

    def close(self) -> None:
        """Nothing is held."""
