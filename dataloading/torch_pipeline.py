"""Batches decoded by Pillow, in worker processes or in this one."""

import dataclasses
import pickle

import torch

from .pipeline import PREFETCH, Bad, BatchSource, Reads, image_bytes, image_memory
from .schema import Batch
from .system.workers import Slot, Workers


class TorchPipeline:
    """Batches from number `first` on, decoded by `num_workers` processes, in the order of steps and parts."""

    def __init__(self, source: BatchSource, *, first: int, num_workers: int, stall_seconds: float):
        self.source, parts = source, source.sampler.parts
        self._workers = Workers(
            self._make,
            first=first,
            count=num_workers,
            ahead=PREFETCH,
            slot_bytes=parts.most_rows * image_bytes(source.image_size),
            stall_seconds=stall_seconds,
            name=parts.name,
        )

    def _images(self, slot: Slot, rows: int) -> torch.Tensor:
        size = self.source.image_size
        return torch.from_numpy(slot[: rows * image_bytes(size)]).view(rows, 2, 3, size, size)

    def _make(self, number: int, slot: Slot) -> bytes:
        parts = self.source.sampler.parts
        step, part = parts.place(number)
        batch, bad = self.source.decoded(step, part, self._images(slot, parts.rows(step)), self.source.index.read_image)
        rest = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch) if f.name != "images"}
        arrays = {name: value.numpy() for name, value in rest.items() if isinstance(value, torch.Tensor)}
        return pickle.dumps((rest | arrays, list(arrays), bad), protocol=5)

    def _unpack(self, rest: bytes, slot: Slot) -> tuple[Batch, Bad]:
        values, arrays, bad = pickle.loads(rest)
        tensors = {name: torch.from_numpy(values[name]) for name in arrays}
        rows = len(values["image_rows"])
        images = image_memory(rows, self.source.image_size).copy_(self._images(slot, rows))
        return Batch(**{**values, **tensors, "images": images}), bad

    def __next__(self) -> tuple[Batch, Bad]:
        """The next batch and the undecodable images met in it."""
        return self._workers.take(self._unpack)

    def stop(self) -> None:
        """End the workers, and a wait for them in another thread."""
        self._workers.close()

    def hangs(self) -> bool:
        """Never: who waits for workers that are killed hears of it."""
        return False

    def close(self) -> None:
        """End the workers."""
        self._workers.close()


class InPlace:
    """Batches from number `first` on, made by this process when they are asked for; decoded=False leaves images out."""

    def __init__(self, source: BatchSource, *, first: int, decoded: bool):
        self.source, self.number, self.decoded = source, first, decoded
        self._reads = Reads(source.index)

    def __next__(self) -> tuple[Batch, Bad]:
        """The next batch and the undecodable images met in it."""
        source, parts = self.source, self.source.sampler.parts
        step, part = parts.place(self.number)
        self.number += 1
        if not self.decoded:
            return source.without_images(step, part), {}
        return source.decoded(step, part, image_memory(parts.rows(step), source.image_size), self._reads)

    def stop(self) -> None:
        """End a batch that is being made in another thread."""
        self._reads.stop()

    def hangs(self) -> bool:
        """Whether that thread waits for a store that does not answer."""
        return self._reads.hang()

    def close(self) -> None:
        """Nothing is held."""
