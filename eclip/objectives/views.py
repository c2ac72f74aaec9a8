"""A view of a batch, encoded: through the towers, or from their outputs where a locked tower's are cached.

Letters: B products, N patch tokens (K of them kept), D embedding width.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from eclip.dataloading.schema import Batch
from eclip.model.eclip import ECLIP, ImageFeatures


@dataclass(frozen=True)
class CachedFeatures:
    """Outputs of locked towers. images: (B, 2, 1+N, width) or None; texts: (B, 2, text width) or None."""

    images: Tensor | None
    texts: Tensor | None

    def map(self, change: Callable[[Tensor], Tensor]) -> "CachedFeatures":
        """Every tensor changed: moved to a device, pinned."""
        return CachedFeatures(*(None if x is None else change(x) for x in (self.images, self.texts)))


@dataclass(frozen=True)
class View:
    """One image of each product and its title, projected by g_I and g_T, not normalised."""

    image: ImageFeatures
    """CLS (B, D) and the kept patch tokens (B, K, D)."""
    text: Tensor
    """(B, D)."""


def encode_view(model: ECLIP, batch: Batch, cached: CachedFeatures | None, view: int, kept: Tensor | None) -> View:
    """View 0 (a) or 1 (b) of a batch by `model`; kept: (2, K) patch tokens of views a and b that stay, None for all.

    A tower computes nothing for the others; of cached features they are dropped.
    """
    cached = cached or CachedFeatures(None, None)
    own = None if kept is None else kept[view]
    if cached.images is not None:
        tower = _keep_tokens(cached.images[:, view], own)
    else:
        assert batch.images is not None, "a batch without images needs cached features"
        tower = model.image_tower(batch.images[:, view], own)
    return View(model.project_image(tower), _encode_text(model, batch, cached, view))


def _keep_tokens(tower_output: Tensor, kept: Tensor | None) -> Tensor:
    """(B, 1+N, width) -> (B, 1+K, width): CLS and the patch tokens `kept` (K,)."""
    if kept is None:
        return tower_output
    return tower_output.index_select(1, torch.cat([kept.new_zeros(1), kept + 1]))


def _encode_text(model: ECLIP, batch: Batch, cached: CachedFeatures, view: int) -> Tensor:
    if cached.texts is not None:
        return model.project_text(cached.texts[:, view])
    tokens, bounds, longest = batch.titles(view)
    return model.encode_text(tokens, bounds, longest=longest)
