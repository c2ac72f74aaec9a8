"""Outputs of locked towers, computed once and read from memory maps.

A tower that does not train gives the same features in every epoch. The cache holds, for every image of a split, V views
(view 0: the whole image; views 1..V-1: random resized crops, half of them flipped) as float16 (I, V, 1+N, width), and
for every different title its pooled float16 text feature (U, text width). Its file names carry a fingerprint of the
shards, the tower's weights and the settings: another tower or another catalogue never reads stale features, and runs on
one catalogue share it. How the files are filled, by several processes and over kills, is in feature_file.py.

An undecodable image is named, and features of another image of its product stand in its place. Features that are not
finite, or that float16 cannot hold, are never stored.
"""

import copy
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eclip.config import RunConfig
from eclip.dataloading.pipeline import CorruptImageError, decode_crop, decode_square, open_image
from eclip.dataloading.sampling import hash64, random_crop
from eclip.dataloading.shards import ShardIndex
from eclip.dataloading.text import WordPiece
from eclip.model.eclip import ECLIP
from eclip.objectives.eclip import CachedFeatures
from eclip.training.feature_cache.disk import Notes
from eclip.training.feature_cache.file import Filling

log = logging.getLogger(__name__)

_CROP_SEED = 0  # not the run's: runs of other seeds choose among the same views
# Keep the choice of views apart from the sampler's draws.
_STREAM_VIEW, _STREAM_OTHER_VIEW = 1000, 1001
_IMAGES, _TITLES = 32, 64  # at a time; part of what makes a continued cache bit-equal
_HINT = (
    "use another folder (it lies in --data-dir; --cache-dir when evaluating), fewer --cached-views, "
    "or no cache (--no-cache-features)"
)
_SHOWN = 5  # names in a message


def cache_folder(config: RunConfig) -> Path:
    """Where a run's cache lies: beside the shards, so that runs on one catalogue share it."""
    return config.data.data_dir / "features"


def single_image_note(index: ShardIndex, config: RunConfig) -> str | None:
    """A line on products with one image only, whose two views show that one image; None where there is none."""
    count = int((np.diff(index.image_start) == 1).sum())
    if not count:
        return None
    note = f"{count} of {index.num_products} products have one image only: "
    if not config.cache_features:
        return note + "two crops of it make their pair"
    if config.cached_views == 1:
        return note + "with --cached-views 1 both sides of their pair are the same to the bit; with more they differ"
    return note + f"two of the {config.cached_views} cached views of it make their pair"


def weights_fingerprint(module: torch.nn.Module) -> str:
    """Digest of a module's parameters and buffers, names and bits."""
    digest = hashlib.blake2b(digest_size=12)
    for name, value in module.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


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
        shown = ", ".join(found[:_SHOWN]) + (", ..." if len(found) > _SHOWN else "")
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


class FeatureCache:
    """Features of one split, looked up by image row. Every rank opens it, and all fill it together."""

    def __init__(
        self,
        images: np.ndarray | None,
        texts: np.ndarray | None,
        title_of: NDArray[np.int64] | None = None,
        undecodable: Mapping[int, str] | None = None,
    ) -> None:
        """images (I, V, 1+N, width); texts (U, text width), and for each image the row of its title in it."""
        self.images, self.texts, self.title_of = images, texts, title_of
        self.undecodable: Mapping[int, str] = undecodable or {}
        """Rows of images that another one of their product stands in for, and why."""

    @classmethod
    def build_or_open(
        cls,
        cache_dir: Path,
        model: ECLIP,
        index: ShardIndex,
        tokenizer: WordPiece,
        config: RunConfig,
        *,
        views: int = 1,
        device: torch.device | str = "cpu",
        progress: bool = True,
    ) -> "FeatureCache":
        """Open the cache of the locked towers of `config`; compute what is missing, with a progress bar.

        Processes that call this at the same time share the work, and each returns when all is there; what a killed one
        had finished is kept. Raises CannotStore (a ValueError) when the disk is full or cannot be written, ValueError
        for a product without a decodable image and for features that are not finite.
        """
        device = torch.device(device)
        images = texts = title_of = None
        undecodable: Notes = {}
        if config.lock_image:
            filling = _Images(model, index, config, views, device).filling(Path(cache_dir), progress)
            images, undecodable = filling.open(), filling.notes()
            if undecodable and progress:
                shown = ", ".join(index.image_key(row) for row in list(undecodable)[:_SHOWN])
                more = ", ..." if len(undecodable) > _SHOWN else ""
                log.warning(
                    "%s: others stand in for %d undecodable images (%s%s)",
                    filling.path, len(undecodable), shown, more,
                )  # fmt: skip
        if config.lock_text:
            titles = _Titles(model, index, tokenizer, config, device)
            texts, title_of = titles.filling(Path(cache_dir), progress).open(), titles.title_of
        return cls(images, texts, title_of, undecodable)

    def lookup(self, rows: Tensor, *, step: int, seed: int) -> CachedFeatures:
        """rows (B, 2) -> CachedFeatures. The view of an image is a function of (seed, step, row, column) alone.

        Both images of a pair are never the same view of the same image, as long as there are two views.
        """
        wanted = rows.cpu().numpy()
        images = None
        if self.images is not None:
            images = torch.from_numpy(self._views(wanted, step, seed)).float().to(rows.device)
        texts = None
        if self.texts is not None:
            assert self.title_of is not None
            texts = torch.from_numpy(self.texts[self.title_of[wanted]]).float().to(rows.device)
        return CachedFeatures(images, texts)

    def _views(self, rows: NDArray[np.int64], step: int, seed: int) -> NDArray[np.float16]:
        assert self.images is not None
        count = self.images.shape[1]
        view = (hash64(seed, _STREAM_VIEW, step, rows, np.arange(2)) % np.uint64(count)).astype(np.int64)
        found = self.images[rows, view]
        if count > 1:
            # By content rather than by row: a stand-in for an undecodable image is another row with the same features.
            same = (found[:, 0, 0] == found[:, 1, 0]).all(-1)
            ahead = hash64(seed, _STREAM_OTHER_VIEW, step, rows[same, 1]) % np.uint64(count - 1)
            found[same, 1] = self.images[rows[same, 1], (view[same, 0] + 1 + ahead.astype(np.int64)) % count]
        return found

    def tower_outputs(self, rows: np.ndarray) -> Tensor:
        """View 0 (the whole image) of each row: (n, 1+N, width) float32, for evaluation."""
        assert self.images is not None, "this cache holds no image features"
        return torch.from_numpy(self.images[rows, 0]).float()


class _Images:
    """The image features of a split: item `row * views + view`."""

    def __init__(self, model: ECLIP, index: ShardIndex, config: RunConfig, views: int, device: torch.device) -> None:
        self.encoder, self.index, self.views, self.device = model.image_encoder, index, views, device
        self.size, self.crop_scale, self.flip = config.model.image_size, config.data.crop_scale, config.data.flip
        self.shape = (index.num_images, views, 1 + config.model.grid**2, config.model.vision_width)

    def filling(self, cache_dir: Path, progress: bool) -> Filling:
        settings = [self.index.fingerprint, weights_fingerprint(self.encoder), self.size, self.views]
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


class _Titles:
    """The text features of a split: an item is a title, which several images may share."""

    def __init__(
        self, model: ECLIP, index: ShardIndex, tokenizer: WordPiece, config: RunConfig, device: torch.device
    ) -> None:
        self.model, self.config, self.index, self.device = model, config, index, device
        _, first_row, inverse = np.unique(index.title_ids, return_index=True, return_inverse=True)
        self.title_of: NDArray[np.int64] = inverse.reshape(-1)
        self.titles = [index.title(int(row)) for row in first_row]
        self.tokens, self.bounds = tokenizer.encode(self.titles, config.data.max_tokens)

    def filling(self, cache_dir: Path, progress: bool) -> Filling:
        pooling = self.config.model.text_pooling
        settings = ["titles", self.index.fingerprint, weights_fingerprint(self.model.text_encoder), pooling]
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
