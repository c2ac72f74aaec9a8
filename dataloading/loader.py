"""An endless, resumable stream of batches: the data side of a training loop.

Global batch s is a pure function of (seed, s, the sizes of the batches before it): see sampling.py. The state is
therefore the next step and a few values to check; it resumes to the exact next batch on any number of ranks and
workers, in whatever parts it comes (parts.py), and with either decoder.
"""

import dataclasses
import importlib.util
import logging
import os
from collections.abc import Iterator, Mapping
from typing import Any, Literal, Protocol

import torch

from .errors import DataError
from .needs import Needs, loader_needs
from .parts import Parts
from .pipeline import PREFETCH, Bad, BatchSource
from .sampling import Sampler
from .schedule import BatchSchedule
from .schema import Batch
from .shards import ShardIndex
from .system.waiting import Beside
from .text import Tokenizer
from .torch_pipeline import InPlace, TorchPipeline

log = logging.getLogger(__name__)

Decoder = Literal["auto", "dali", "torch", "none"]


class _Pipeline(Protocol):
    def __next__(self) -> tuple[Batch, Bad]: ...

    def close(self) -> None: ...


class _Stoppable(_Pipeline, Protocol):
    def stop(self) -> None: ...

    def hangs(self) -> bool: ...


class _Ahead:
    """A pipeline in a thread that is `ahead` batches ahead.

    So reading, decoding and copying go on beside the training step, and a call that hangs is named after a while.
    """

    def __init__(
        self, pipeline: _Stoppable, source: BatchSource, *, first: int, ahead: int, stall_seconds: float
    ) -> None:
        self._number, self._seconds = first, stall_seconds
        self._name, self._data_dir = source.sampler.parts.name, source.index.data_dir
        device = torch.cuda.current_device() if torch.cuda.is_available() else None
        self._beside = Beside(
            pipeline.__next__,
            ahead=ahead,
            what=self._stalled,
            stall_seconds=stall_seconds,
            setup=lambda: None if device is None else torch.cuda.set_device(device),
            teardown=pipeline.close,
            stop=pipeline.stop,
            hangs=pipeline.hangs,
        )

    def _stalled(self) -> str:
        return (
            f"{self._name(self._number)}: no batch within {self._seconds:g} s (--stall-seconds): the decoder is still "
            f"at it, with images of {self._data_dir}: a slow or unreachable store, or a busy machine; raise the limit, "
            f"or lower --global-batch-size or --micro-batch"
        )

    def __next__(self) -> tuple[Batch, Bad]:
        item = self._beside.take()
        self._number += 1
        return item

    def close(self) -> None:
        self._beside.close()


def choose_decoder(decoder: Decoder) -> Literal["dali", "torch", "none"]:
    """Resolve "auto": DALI where it is installed and has a GPU, else torch.

    On a CPU the torch path takes DALI's time for 160 px images (1500 a CPU second, cropped to 96 px) and, thanks to its
    scaled decode, 1.4 to 1.8 times less for megapixel ones.

    Raises ValueError for an unknown name, and for "dali" where DALI is not installed.
    """
    if decoder not in ("auto", "dali", "torch", "none"):
        raise ValueError(f"decoder={decoder!r}: use auto, dali, torch or none")
    installed = importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None
    if decoder == "dali" and not installed:
        raise ValueError(
            "decoder='dali': NVIDIA DALI is not installed; install nvidia-dali-cuda130 (pip install -e .[gpu]), "
            "or choose --decoder torch"
        )
    if decoder == "auto":
        return "dali" if installed and torch.cuda.is_available() else "torch"
    return decoder


class ProductLoader:
    """Iterate over Batches without end: a rank's share of every step, two images and titles of each product.

    global_batch_size: products of a step over all ranks, or a schedule of them. micro_batch: products of a Batch; a
    step's share comes as `Batch.parts` of them, in order. None: as one. index: the split. tokenizer: its own.
    image_size: side of the crops, pixels. crop_scale: area share of the random resized crop; flip: mirror half of the
    crops. decoder: see `choose_decoder`; "none" leaves `images` None and starts no worker. num_workers: processes of
    the torch decoder (0: decode in this one), threads of DALI. stall_seconds: how long a batch may take, 0 without
    limit.

    With DALI on a GPU `images` lie on the current CUDA device, all else on the CPU, in pinned memory where there is a
    GPU. An undecodable image is replaced by another one of its product; it is named once in `Batch.corrupt`, in the log
    and in `corrupt` (key to reason).
    One iterator at a time: a new one continues where the last one stood, with the first part of the step whose last
    part has not been given.

    Raises ValueError for settings that make no sense; its iterators raise DataError (a ValueError) when a tar cannot be
    read any more, a worker is killed, or no batch comes in time.
    """

    def __init__(
        self,
        index: ShardIndex,
        tokenizer: Tokenizer,
        *,
        global_batch_size: int | BatchSchedule,
        image_size: int,
        micro_batch: int | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        decoder: Decoder = "auto",
        num_workers: int = 1,
        crop_scale: tuple[float, float] = (0.5, 1.0),
        flip: bool = True,
        max_tokens: int = 55,
        stall_seconds: float = 300,
    ):
        given = global_batch_size
        self.schedule = given if isinstance(given, BatchSchedule) else BatchSchedule.constant(given)
        parts = Parts(self.schedule, rank, world_size, micro_batch)
        if not 0 < crop_scale[0] <= crop_scale[1] <= 1:
            raise ValueError(f"crop_scale={crop_scale}: area shares need 0 < lowest <= highest <= 1")
        if image_size < 1 or num_workers < 0:
            raise ValueError(f"image_size={image_size}, num_workers={num_workers}: use a size >= 1 and workers >= 0")
        if not 0 <= stall_seconds < float("inf"):
            raise ValueError(f"stall_seconds={stall_seconds}: use 0 (no limit) or more")
        self.index, self.tokenizer, self.seed = index, tokenizer, seed
        self.decoder = choose_decoder(decoder)
        self.num_workers, self.stall_seconds = num_workers, stall_seconds
        self.corrupt: dict[str, str] = {}
        self._step = 0
        sampler = Sampler(index, parts, seed=seed)
        self._source = BatchSource(
            sampler, tokenizer, image_size=image_size, crop_scale=crop_scale, flip=flip, max_tokens=max_tokens
        )

    @property
    def steps_per_epoch(self) -> float:
        """Steps in which every product is seen once, from the next step on; a part of a step counts by its size."""
        return self._steps_to(self.schedule.position(self._step) + self.index.num_products) - self._step

    def _steps_to(self, position: int) -> float:
        """Where in the series of steps the endless stream of products has reached a position."""
        last = self.schedule.steps(position) - 1
        return last + (position - self.schedule.position(last)) / self.schedule.size(last)

    @property
    def needs(self) -> Needs:
        """What an iterator of this loader takes of the machine's memory; `require_memory` compares it."""
        rows, size = self._source.sampler.parts.most_rows, self._source.image_size
        return loader_needs(rows, size, self.num_workers, self.decoder, on_gpu=torch.cuda.is_available())

    def _open(self) -> _Pipeline:
        source, limit = self._source, self.stall_seconds
        first = source.sampler.parts.before(self._step)
        if self.decoder == "none":
            return InPlace(source, first=first, decoded=False)
        if self.decoder == "dali":
            from .dali_pipeline import DaliPipeline  # DALI takes 0.5 s to import and is optional

            dali = DaliPipeline(source, first=first, num_threads=max(1, self.num_workers))
            return _Ahead(dali, source, first=first, ahead=PREFETCH, stall_seconds=limit)
        if not self.num_workers:
            in_place = InPlace(source, first=first, decoded=True)
            return _Ahead(in_place, source, first=first, ahead=PREFETCH, stall_seconds=limit)
        # Training a vocabulary used the tokenizers' threads; without this every forked worker warns about them.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        workers = TorchPipeline(source, first=first, num_workers=self.num_workers, stall_seconds=limit)
        # The thread copies one batch out of the workers' memory; they are ahead themselves, and know what keeps them.
        return _Ahead(workers, source, first=first, ahead=1, stall_seconds=0)

    def __iter__(self) -> Iterator[Batch]:
        pipeline = self._open()
        try:
            while True:
                try:
                    batch, bad = next(pipeline)
                except MemoryError as error:
                    raise DataError(
                        f"step {self._step}: no memory for its batch ({error}); use fewer --num-workers, or a smaller "
                        f"--global-batch-size or --micro-batch"
                    ) from error
                new = {key: reason for key, reason in bad.items() if key not in self.corrupt}
                for key, reason in new.items():
                    self.corrupt[key] = reason
                    log.warning(
                        "undecodable image %s (%s): another one of the product takes its place; %d so far",
                        key, reason, len(self.corrupt),
                    )  # fmt: skip
                self._step = batch.step + (batch.part == batch.parts - 1)
                yield dataclasses.replace(batch, corrupt=tuple(new)).pinned()
        finally:
            pipeline.close()

    def state_dict(self) -> dict[str, Any]:
        """The position after the last step whose parts were all yielded, whatever workers have prepared beyond it.

        Equal on all ranks.
        """
        return {"step": self._step, **self._identity(self._step)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue with the next batch of the run that saved `state`; start a new iterator afterwards.

        Raises ValueError when seed, catalogue or the batch sizes of the steps so far differ: the order would be another
        one. Later sizes, ranks and parts may differ.
        """
        step = int(state["step"])
        saved = {**state, "batch_schedule": _saved_sizes(state).until(step)}
        mine = {**self._identity(step), "batch_schedule": self.schedule.until(step)}
        for name, value in mine.items():
            if saved[name] != value:
                raise ValueError(
                    f"the saved data position, step {step}, has {name}={saved[name]}, this run {value}; "
                    f"resume with the same {name.replace('_', ' ')}, or start a new run folder"
                )
        self._step = step

    def _identity(self, step: int) -> dict[str, Any]:
        past = [list(entry) for entry in self.schedule.until(step).entries]
        return {"seed": self.seed, "batch_schedule": past, "fingerprint": self.index.fingerprint}


def _saved_sizes(state: Mapping[str, Any]) -> BatchSchedule:
    """Of the steps that a state comes after."""
    if "batch_schedule" in state:
        return BatchSchedule(tuple((int(step), int(size)) for step, size in state["batch_schedule"]))
    return BatchSchedule.constant(int(state["global_batch_size"]))  # written before there were schedules
