"""An endless, resumable stream of batches: the data side of a training loop.

Global batch s is a pure function of (seed, s): see sampling.py. The state is therefore the next step and a few values
to check; it resumes to the exact next batch on any number of ranks and workers, and with either decoder.
"""

import dataclasses
import importlib.util
import logging
import os
from collections.abc import Iterator, Mapping
from typing import Any, Literal, Protocol

import torch

from .errors import DataError
from .pipeline import Bad, BatchSource
from .sampling import Sampler
from .schema import Batch
from .shards import ShardIndex
from .system.waiting import Beside
from .text import WordPiece
from .torch_pipeline import InPlace, TorchPipeline

log = logging.getLogger(__name__)

Decoder = Literal["auto", "dali", "torch", "none"]


class _Pipeline(Protocol):
    def __next__(self) -> tuple[Batch, Bad]: ...

    def close(self) -> None: ...


class _InTime:
    """A pipeline that works in this process, in a thread of it: so a call that hangs is named after a while."""

    def __init__(self, pipeline: _Pipeline, source: BatchSource, first_step: int, stall_seconds: float):
        self._step, self._data_dir, self._seconds = first_step, source.index.data_dir, stall_seconds
        device = torch.cuda.current_device() if torch.cuda.is_available() else None
        self._pipeline = pipeline
        self._beside = Beside(
            pipeline.__next__,
            what=self._stalled,
            stall_seconds=stall_seconds,
            setup=lambda: None if device is None else torch.cuda.set_device(device),
        )

    def _stalled(self) -> str:
        return (
            f"step {self._step}: no batch within {self._seconds:g} s (--stall-seconds): the decoder is still at it, "
            f"with images of {self._data_dir}: a slow or unreachable store, or a busy machine; raise the limit, or "
            f"lower --global-batch-size"
        )

    def __next__(self) -> tuple[Batch, Bad]:
        item = self._beside.take()
        self._step += 1
        return item

    def close(self) -> None:
        self._beside.close()
        self._pipeline.close()


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
    """Iterate over Batches without end: B = global_batch_size / world_size products, two images and titles of each.

    index: the split. tokenizer: its WordPiece. image_size: side of the crops, pixels. crop_scale: area share of the
    random resized crop; flip: mirror half of the crops. decoder: see `choose_decoder`; "none" leaves `images` None and
    starts no worker. num_workers: processes of the torch decoder (0: decode in this one), threads of DALI.
    stall_seconds: how long a batch may take, 0 without limit.

    With DALI on a GPU `images` lie on the current CUDA device, all else on the CPU. An undecodable image is replaced by
    another one of its product; it is named once in `Batch.corrupt`, in the log and in `corrupt` (key to reason).
    One iterator at a time: a new one continues where the last one stood.

    Raises ValueError for settings that make no sense; its iterators raise DataError (a ValueError) when a tar cannot be
    read any more, a worker is killed, or no batch comes in time.
    """

    def __init__(
        self,
        index: ShardIndex,
        tokenizer: WordPiece,
        *,
        global_batch_size: int,
        image_size: int,
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
        if global_batch_size < 1 or global_batch_size % world_size:
            raise ValueError(
                f"global_batch_size={global_batch_size} does not divide over {world_size} ranks; "
                f"set --global-batch-size to a multiple of {world_size}"
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank} of world_size={world_size}: ranks count from 0 to world_size - 1")
        if not 0 < crop_scale[0] <= crop_scale[1] <= 1:
            raise ValueError(f"crop_scale={crop_scale}: area shares need 0 < lowest <= highest <= 1")
        if image_size < 1 or num_workers < 0:
            raise ValueError(f"image_size={image_size}, num_workers={num_workers}: use a size >= 1 and workers >= 0")
        if not 0 <= stall_seconds < float("inf"):
            raise ValueError(f"stall_seconds={stall_seconds}: use 0 (no limit) or more")
        self.index, self.tokenizer = index, tokenizer
        self.global_batch_size, self.seed = global_batch_size, seed
        self.decoder = choose_decoder(decoder)
        self.num_workers, self.stall_seconds = num_workers, stall_seconds
        self.corrupt: dict[str, str] = {}
        self._step = 0
        sampler = Sampler(index, global_batch_size=global_batch_size, seed=seed, rank=rank, world_size=world_size)
        self._source = BatchSource(
            sampler, tokenizer, image_size=image_size, crop_scale=crop_scale, flip=flip, max_tokens=max_tokens
        )

    @property
    def steps_per_epoch(self) -> float:
        """Steps in which every product is seen once."""
        return self.index.num_products / self.global_batch_size

    def _open(self) -> _Pipeline:
        source, first, limit = self._source, self._step, self.stall_seconds
        if self.decoder == "none":
            return InPlace(source, first_step=first, decoded=False)
        if self.decoder == "dali":
            from .dali_pipeline import DaliPipeline  # DALI takes 0.5 s to import and is optional

            dali = DaliPipeline(source, first_step=first, num_threads=max(1, self.num_workers))
            return _InTime(dali, source, first, limit)
        if not self.num_workers:
            return _InTime(InPlace(source, first_step=first, decoded=True), source, first, limit)
        # Training a vocabulary used the tokenizers' threads; without this every forked worker warns about them.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        return TorchPipeline(source, first_step=first, num_workers=self.num_workers, stall_seconds=limit)

    def __iter__(self) -> Iterator[Batch]:
        pipeline = self._open()
        try:
            while True:
                try:
                    batch, bad = next(pipeline)
                except MemoryError as error:
                    raise DataError(
                        f"step {self._step}: no memory for its batch ({error}); use fewer --num-workers or a smaller "
                        f"--global-batch-size"
                    ) from error
                new = {key: reason for key, reason in bad.items() if key not in self.corrupt}
                for key, reason in new.items():
                    self.corrupt[key] = reason
                    log.warning(
                        "undecodable image %s (%s): another one of the product takes its place; %d so far",
                        key, reason, len(self.corrupt),
                    )  # fmt: skip
                self._step = batch.step + 1
                yield dataclasses.replace(batch, corrupt=tuple(new))
        finally:
            pipeline.close()

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch yielded, whatever workers have prepared beyond it; equal on all ranks."""
        return {"step": self._step, **self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue with the next batch of the run that saved `state`; start a new iterator afterwards.

        Raises ValueError when seed, global batch size or catalogue differ: the order would be another one.
        """
        for name, mine in self._identity().items():
            if state[name] != mine:
                raise ValueError(
                    f"the saved data position has {name}={state[name]}, this run {mine}; "
                    f"resume with the same {name.replace('_', ' ')}, or start a new run folder"
                )
        self._step = int(state["step"])

    def _identity(self) -> dict[str, Any]:
        return {"seed": self.seed, "global_batch_size": self.global_batch_size, "fingerprint": self.index.fingerprint}
