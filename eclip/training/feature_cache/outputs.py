"""What is stored of each tower: its features of every image and of every different title, and the name of their file.

An undecodable image is named, and features of another image of its product stand in its place. Features that are not
finite, or that float16 cannot hold, are never stored.
"""

import copy
import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eclip.config import RunConfig
from eclip.dataloading.images import CorruptImageError, open_image
from eclip.dataloading.pipeline import decode_crop, decode_square
from eclip.dataloading.sampling import random_crop
from eclip.dataloading.shards import ShardIndex
from eclip.dataloading.text import Tokenizer
from eclip.model.eclip import ECLIP
from eclip.model.settings import ModelConfig
from eclip.training.feature_cache.disk import Notes
from eclip.training.feature_cache.file import Filling

log = logging.getLogger(__name__)

_CROP_SEED = 0  # not the run's: runs of other seeds choose among the same views
_IMAGES, _TITLES = 32, 64  # at a time; part of what makes a continued cache bit-equal
_HINT = (
    "use another folder (it lies in --data-dir; --cache-dir when evaluating), fewer --cached-views, "
    "or no cache (--no-cache-features)"
)
SHOWN = 5  # names in a message


def weights_fingerprint(module: torch.nn.Module) -> str:
    """Digest of a module's parameters and buffers, names and bits."""
    digest = hashlib.blake2b(digest_size=12)
    for name, value in module.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _unusual(model: ModelConfig, names: Sequence[str]) -> list[dict[str, Any]]:
    """Settings that change what a tower computes and not its weights, where they are not the usual ones.

    Nothing for usual ones, so that a cache made before they were settings keeps its name.
    """
    usual, settings = asdict(ModelConfig()), asdict(model)
    changed = {name: settings[name] for name in names if settings[name] != usual[name]}
    return [changed] if changed else []


def _native_bf16(device: torch.device) -> bool:
    """Whether the chip multiplies bfloat16 natively.

    Twice as fast on a CPU with AVX512-BF16 (ViT-S/14, 168 px), where autocast casts every weight again in every batch.
    """
    avx512_bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)  # not a public name
    return device.type == "cuda" or bool(avx512_bf16())


def _storable(features: Tensor, names: Sequence[str], what: str) -> NDArray[np.float16]:
    """features (n, ...) as float16. Raises ValueError naming those that are not finite or too large for it."""
    if not (good := features.flatten(1).isfinite().all(1).cpu()).all():
        found = [names[i] for i in np.flatnonzero(~good.numpy())]
        shown = ", ".join(found[:SHOWN]) + (", ..." if len(found) > SHOWN else "")
        raise ValueError(
            f"the {what} tower gives NaN or infinity for {len(found)} of {len(names)} at once ({shown}); "
            f"its weights are damaged or overflow, nothing was stored: give others"
        )
    half = features.half()
    if not (good := half.flatten(1).isfinite().all(1).cpu()).all():
        first = int(np.flatnonzero(~good.numpy())[0])
        raise ValueError(
            f"{names[first]}: the {what} tower's features reach {features[first].abs().max():.0f}, more than the "
            f"{np.finfo(np.float16).max:.0f} that a cache of float16 can hold; use --no-cache-features"
        )
    return half.cpu().numpy()


class ImageOutputs:
    """The image features of a split: item `row * views + view`."""

    def __init__(self, model: ECLIP, index: ShardIndex, config: RunConfig, views: int, device: torch.device) -> None:
        self.encoder, self.index, self.views, self.device = model.image_encoder, index, views, device
        self.size, self.crop_scale, self.flip = config.model.image_size, config.data.crop_scale, config.data.flip
        self.shape = (index.num_images, views, 1 + config.model.grid**2, config.model.vision_width)

    def filling(self, cache_dir: Path, progress: bool) -> Filling:
        settings = [self.index.fingerprint, weights_fingerprint(self.encoder), self.size, self.views]
        settings += _unusual(self.encoder.config, ("vision_activation", "pixel_statistics"))
        settings += [self.crop_scale, self.flip, _CROP_SEED] if self.views > 1 else []
        name = hashlib.blake2b(json.dumps(settings).encode(), digest_size=8).hexdigest()
        return Filling(
            path=cache_dir / f"images-{name}.npy",
            shape=self.shape,
            compute=self.compute,
            batch=-(-_IMAGES // self.views),
            settings=f"{self.device.type}, {'bfloat16' if _native_bf16(self.device) else 'float32'}",
            label="caching image features",
            unit="image",
            hint=_HINT,
            progress=progress,
        )

    @cached_property
    def tower(self) -> torch.nn.Module:
        """In bfloat16, a copy, where that is fast."""
        if _native_bf16(self.device):
            return copy.deepcopy(self.encoder).to(self.device, torch.bfloat16).eval()
        return self.encoder

    @torch.inference_mode()
    def compute(self, first: int, last: int) -> tuple[NDArray[np.float16], Notes]:
        """All views of rows first..last-1, and the undecodable among them."""
        notes: Notes = {}
        wanted = [(row, view) for row in range(first, last) for view in range(self.views)]
        pixels = torch.stack([self._load_or_substitute(row, view, notes) for row, view in wanted])
        names = [self.index.image_key(row) for row, _ in wanted]
        features = _storable(self.tower(pixels.to(self.device)), names, "image")
        return features.reshape(last - first, *self.shape[1:]), notes

    def _load_or_substitute(self, row: int, view: int, notes: Notes) -> Tensor:
        product = self.index.product_of(row)
        siblings = range(self.index.image_start[product], self.index.image_start[product + 1])
        for candidate in [row, *(other for other in siblings if other != row)]:
            try:
                return self._load(candidate, view)
            except CorruptImageError as error:
                if candidate == row and row not in notes:
                    notes[row] = str(error)
                    key = self.index.image_key(row)
                    log.warning("undecodable image %s (%s): another one of its product stands in", key, error)
        raise ValueError(
            f"{self.index.image_key(row)}: no image of its product can be decoded; pack the catalogue again"
        )

    def _load(self, row: int, view: int) -> Tensor:
        data = self.index.read_image(row)
        if view == 0:
            return decode_square(data, self.size)
        draws = np.random.Generator(np.random.Philox(key=[_CROP_SEED, row * self.views + view])).random(5)
        box = random_crop(draws[:4], *open_image(data).size, self.crop_scale)
        return torch.from_numpy(decode_crop(data, self.size, box, flip=bool(self.flip and draws[4] < 0.5)).copy())


class TitleOutputs:
    """The text features of a split: an item is a title, which several images may share."""

    def __init__(
        self, model: ECLIP, index: ShardIndex, tokenizer: Tokenizer, config: RunConfig, device: torch.device
    ) -> None:
        self.model, self.config, self.index, self.device = model, config, index, device
        _, first_row, inverse = np.unique(index.title_ids, return_index=True, return_inverse=True)
        self.title_of: NDArray[np.int64] = inverse.reshape(-1)
        self.titles = [index.title(int(row)) for row in first_row]
        self.tokens, self.bounds = tokenizer.encode(self.titles, config.data.max_tokens)

    def filling(self, cache_dir: Path, progress: bool) -> Filling:
        pooling = self.config.model.text_pooling
        settings: list[Any] = ["titles", self.index.fingerprint, weights_fingerprint(self.model.text_encoder), pooling]
        settings += _unusual(self.config.model, ("text_architecture", "text_activation"))
        digest = hashlib.blake2b(json.dumps(settings).encode(), digest_size=8)
        digest.update(self.tokens.numpy().data)  # stands for the vocabulary and the cut at max_tokens
        return Filling(
            path=cache_dir / f"texts-{digest.hexdigest()}.npy",
            shape=(len(self.titles), self.config.model.text_width),
            compute=self.compute,
            batch=_TITLES,
            settings=self.device.type,
            label="caching text features",
            unit="title",
            hint=_HINT,
            progress=progress,
        )

    @torch.inference_mode()
    def compute(self, first: int, last: int) -> tuple[NDArray[np.float16], Notes]:
        bounds = self.bounds[first : last + 1]
        ids = self.tokens[int(bounds[0]) : int(bounds[-1])].to(self.device)
        features = self.model.text_tower(ids, (bounds - bounds[0]).to(self.device))
        names = [f"the title {title!r}" for title in self.titles[first:last]]
        return _storable(features, names, "text"), {}
