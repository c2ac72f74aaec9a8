"""Does it fit? The memory of the step and of the loader, and the disk of the feature cache, before a model is built.

A run that needs more than 1.2 times of what is there is refused, with the numbers and flags that fit; one that comes
close is told so. The estimates err by a fifth or so: whatever might fit is let go on.
"""

import dataclasses
import shutil
from collections.abc import Callable

import torch

from eclip.config import RunConfig
from eclip.dataloading.shards import ShardIndex
from eclip.dataloading.system.memory import available_memory
from eclip.dataloading.text import Tokenizer
from eclip.parallel.ranks import Ranks
from eclip.training.feature_cache.cache import cache_folder
from eclip.training.starting.memory import cache_bytes, loader_bytes, state_bytes, step_bytes
from eclip.training.step import use_bf16

_SURELY, _CLOSE = 1.2, 0.85
_GIB = 1 << 30
_SAMPLED_TITLES = 256


class TooLarge(ValueError):
    """It surely does not fit: how much is needed, how much is there, and what would fit."""


def check_resources(config: RunConfig, index: ShardIndex, tokenizer: Tokenizer, ranks: Ranks) -> tuple[str, ...]:
    """Lines to print about what is nearly too much. All ranks call it, and all raise TooLarge when one must."""
    mine: tuple[str | None, tuple[str, ...]]
    try:
        mine = (None, _check(config, index, tokenizer, ranks))
    except TooLarge as error:
        mine = (str(error), ())
    everyone = ranks.gather(mine)
    problem = next((text for text, _ in everyone if text is not None), None)
    if problem is not None:
        raise TooLarge(problem)
    return tuple(dict.fromkeys(line for _, lines in everyone for line in lines))


def _check(config: RunConfig, index: ShardIndex, tokenizer: Tokenizer, ranks: Ranks) -> tuple[str, ...]:
    notes = _check_disk(config, index)
    if config.steps == 0:
        return notes
    fit = _Fit(config, mean_tokens(index, tokenizer, config.data.max_tokens), ranks)
    return (*notes, *fit.check())


def mean_tokens(index: ShardIndex, tokenizer: Tokenizer, most: int) -> float:
    """Of a title, over a sample of images."""
    rows = range(0, index.num_images, max(1, index.num_images // _SAMPLED_TITLES))
    _, bounds = tokenizer.encode([index.title(row) for row in rows], most)
    return float(bounds[-1]) / len(rows)


@dataclasses.dataclass(frozen=True)
class _Fit:
    """A run on this machine."""

    config: RunConfig
    tokens: float
    ranks: Ranks

    @property
    def cuda(self) -> bool:
        return self.ranks.device.type == "cuda"

    @property
    def shards(self) -> int:
        """Ranks that parameters, gradients and optimizer state are spread over."""
        match self.config.compute.shard:
            case "none":
                return 1
            case "hybrid":
                return self.ranks.local_size
            case "full":
                return self.ranks.world_size

    def step(self, config: RunConfig) -> float:
        ranks = self.ranks
        bf16 = use_bf16(config, ranks)
        return step_bytes(
            config, self.tokens, world_size=ranks.world_size, shards=self.shards, bf16=bf16, cuda=self.cuda
        )

    def device(self, config: RunConfig) -> float:
        """Bytes of this rank on its GPU."""
        offloaded = state_bytes(config, self.shards) if config.compute.cpu_offload else 0
        return self.step(config) - offloaded

    def host(self, config: RunConfig) -> float:
        """Bytes of this rank on its machine."""
        total = loader_bytes(config, self.ranks.world_size, on_gpu=self.cuda)
        if not self.cuda:
            return total + self.step(config)
        return total + (state_bytes(config, self.shards) if config.compute.cpu_offload else 0)

    def check(self) -> tuple[str, ...]:
        notes: tuple[str, ...] = ()
        if self.cuda:
            notes += self._judge(self.device, torch.cuda.mem_get_info(self.ranks.device)[0], gpu=True)
        left = available_memory()
        if left is None:  # the system does not say
            return notes
        return notes + self._judge(self.host, left / self.ranks.local_size, gpu=False)

    def _judge(self, need: Callable[[RunConfig], float], free: float, *, gpu: bool) -> tuple[str, ...]:
        """Raise TooLarge, or a line, or nothing, of a rank's share of the machine or (gpu) of its GPU."""
        needed = need(self.config)
        if needed <= _CLOSE * free:
            return ()
        what = "of GPU memory" if gpu else "of memory"
        line = f"about {needed / _GIB:.1f} GiB {what} are needed{self._by(gpu)}, {free / _GIB:.1f} are free"
        if needed > _SURELY * free:
            raise TooLarge(f"{line}{self._parts(gpu)}; {self._way_out(need, free)}")
        return (f"{line}: close; {self._way_out(need, free)} if it does not suffice",)

    def _by(self, gpu: bool) -> str:
        ranks = self.ranks
        if ranks.world_size == 1 or (ranks.local_size == 1 and not gpu):
            return ""
        return " by a rank" if gpu else f" by each of {ranks.local_size} ranks"

    def _parts(self, gpu: bool) -> str:
        config = self.config
        states = state_bytes(config, self.shards) / _GIB
        loader = loader_bytes(config, self.ranks.world_size, on_gpu=self.cuda) / _GIB
        size = config.micro_batch or config.schedule.largest // self.ranks.world_size
        shown = f"model and optimizer {states:.1f}"
        if not gpu:
            shown += f", {config.data.num_workers} data workers {loader:.1f}"
        if gpu or not self.cuda:
            shown += f", the rest for {size} products at a time"
        return f" ({shown})"

    def _way_out(self, need: Callable[[RunConfig], float], free: float) -> str:
        """Flags with which it fits, the mildest first."""
        config, room = self.config, _CLOSE * free
        fewer = dataclasses.replace(config, data=dataclasses.replace(config.data, num_workers=1))
        ways: list[tuple[str, RunConfig]] = []
        if config.data.num_workers > 1 and not config.cache_features:
            ways.append(("--num-workers 1", fewer))
        for size in _smaller(config, self.ranks.world_size):
            flags = f"--micro-batch {size}"
            ways.append((flags, dataclasses.replace(config, micro_batch=size)))
            if ways[0][0] == "--num-workers 1":
                ways.append((f"{flags} --num-workers 1", dataclasses.replace(fewer, micro_batch=size)))
        fitting = next((flags for flags, changed in ways if need(changed) <= room), None)
        if fitting is not None:
            return f"{fitting} fits"
        return (
            "no --micro-batch fits: a smaller --global-batch-size or model, --lock-image --lock-text, or more GPUs "
            "(--shard full) would"
        )


def _smaller(config: RunConfig, world_size: int) -> list[int]:
    """Micro-batches that divide every rank's share, the largest first."""
    shares = [size // world_size for size in config.schedule.sizes]
    most = min(config.micro_batch or max(shares), min(shares))
    return [size for size in range(most, 0, -1) if all(share % size == 0 for share in shares)]


def _check_disk(config: RunConfig, index: ShardIndex) -> tuple[str, ...]:
    """Raise TooLarge when the feature cache surely has no room; a whole or begun one of its size has its room."""
    if not config.cache_features or config.steps == 0:
        return ()
    folder, needed = cache_folder(config), cache_bytes(config, index.num_images)
    there = [path for pattern in ("images-*.npy", "images-*.partial") for path in folder.glob(pattern)]
    if any(needed <= path.stat().st_size <= needed + 4096 for path in there):
        return ()
    free = shutil.disk_usage(folder if folder.is_dir() else config.data.data_dir).free
    line = (
        f"{folder}: the features of {index.num_images} images in {config.cached_views} views take "
        f"{needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
    )
    if needed > free:
        raise TooLarge(
            f"{line}; free some, use fewer --cached-views, another --data-dir, or no cache (--no-cache-features)"
        )
    return (f"{line}: close",) if needed > _CLOSE * free else ()
