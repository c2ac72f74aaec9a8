"""Batches decoded by Pillow, in worker processes or in this one."""

import dataclasses
import pickle

import torch

from .pipeline import PREFETCH, Bad, BatchSource
from .schema import Batch
from .system.workers import Slot, Workers


class TorchPipeline:
    """Batches from `first_step` on, decoded by `num_workers` processes, in the order of the steps."""

    def __init__(self, source: BatchSource, *, first_step: int, num_workers: int, stall_seconds: float):
        self.source = source
        batch_size, size = source.sampler.local_batch_size, source.image_size
        self._shape = (batch_size, 2, 3, size, size)
        self._workers = Workers(
            self._make,
            first=first_step,
            count=num_workers,
            ahead=PREFETCH,
            slot_bytes=batch_size * 2 * 3 * size * size,
            stall_seconds=stall_seconds,
        )

    def _make(self, step: int, slot: Slot) -> bytes:
        batch, bad = self.source.decoded(step)
        assert batch.images is not None
        slot[:] = batch.images.numpy().ravel()
        rest = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch) if f.name != "images"}
        arrays = {name: value.numpy() for name, value in rest.items() if isinstance(value, torch.Tensor)}
        return pickle.dumps((rest | arrays, list(arrays), bad), protocol=5)

    def _unpack(self, rest: bytes, slot: Slot) -> tuple[Batch, Bad]:
        values, arrays, bad = pickle.loads(rest)
        tensors = {name: torch.from_numpy(values[name]) for name in arrays}
        images = torch.from_numpy(slot).view(self._shape).clone()
        return Batch(**{**values, **tensors, "images": images}), bad

    def __next__(self) -> tuple[Batch, Bad]:
        """The next batch and the undecodable images met in it."""
        return self._workers.take(self._unpack)

    def close(self) -> None:
        """End the workers."""
        self._workers.close()


class InPlace:
    """Batches from `first_step` on, made by this process when they are asked for; decoded=False leaves images out."""

    def __init__(self, source: BatchSource, *, first_step: int, decoded: bool):
        self.source, self.step, self.decoded = source, first_step, decoded

    def __next__(self) -> tuple[Batch, Bad]:
        """The next batch and the undecodable images met in it."""
        step = self.step
        self.step += 1
        return self.source.decoded(step) if self.decoded else (self.source.without_images(step), {})

    def close(self) -> None:
        """Nothing is held."""
