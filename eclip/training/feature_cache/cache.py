"""Outputs of locked towers, computed once and read from memory maps.

A tower that does not train gives the same features in every epoch. The cache holds, for every image of a split, V views
(view 0: the whole image; views 1..V-1: random resized crops, half of them flipped) as float16 (I, V, 1+N, width), and
for every different title its pooled float16 text feature (U, text width). Its file names carry a fingerprint of the
shards, the tower's weights and the settings: another tower or another catalogue never reads stale features, and runs on
one catalogue share it.
"""

import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eclip.config import RunConfig
from eclip.dataloading.sampling import hash64
from eclip.dataloading.shards import ShardIndex
from eclip.dataloading.text import Tokenizer
from eclip.model.eclip import ECLIP
from eclip.objectives.views import CachedFeatures
from eclip.training.feature_cache.disk import Notes
from eclip.training.feature_cache.outputs import SHOWN, ImageOutputs, TitleOutputs

log = logging.getLogger(__name__)

# Keep the choice of views apart from the sampler's draws.
_STREAM_VIEW, _STREAM_OTHER_VIEW = 1000, 1001


def cache_folder(config: RunConfig) -> Path:
    """Where a run's cache lies: beside the shards, so that runs on one catalogue share it."""
    return config.data.data_dir / "features"


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
        tokenizer: Tokenizer,
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
            filling = ImageOutputs(model, index, config, views, device).filling(Path(cache_dir), progress)
            images, undecodable = filling.open(), filling.notes()
            if undecodable and progress:
                shown = ", ".join(index.image_key(row) for row in list(undecodable)[:SHOWN])
                more = ", ..." if len(undecodable) > SHOWN else ""
                log.warning(
                    "%s: others stand in for %d undecodable images (%s%s)",
                    filling.path, len(undecodable), shown, more,
                )  # fmt: skip
        if config.lock_text:
            titles = TitleOutputs(model, index, tokenizer, config, device)
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
