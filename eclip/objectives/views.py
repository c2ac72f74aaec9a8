"""A view of a batch, encoded: through the towers, or from their outputs where a locked tower's are cached.

Letters: B products, N patch tokens (K of them kept), D embedding width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from eclip.dataloading.schema import Batch
from eclip.model.eclip import ECLIP, ImageFeatures
from eclip.objectives.draws import draw_tokens


@dataclass(frozen=True)
class CachedFeatures:
    """Outputs of locked towers. images: (B, 2, 1+N, width) or None; texts: (B, 2, text width) or None."""

    images: Tensor | None
    texts: Tensor | None


@dataclass(frozen=True)
class View:
    """One image of each product and its title, projected by g_I and g_T, not normalised."""

    image: ImageFeatures
    """CLS (B, D) and the kept patch tokens (B, K, D)."""
    text: Tensor
    """(B, D)."""


def encode_view(
    model: ECLIP, batch: Batch, cached: CachedFeatures | None, view: int, *, token_keep: float, step: int, seed: int
) -> View:
    """View 0 (a) or 1 (b) of a batch by `model`; `token_keep` is the share of patch tokens that stay this step."""
    cached = cached or CachedFeatures(None, None)
    if cached.images is not None:
        tower = cached.images[:, view]
    else:
        assert batch.images is not None, "a batch without images needs cached features"
        tower = model.image_tower(batch.images[:, view])
    kept = draw_tokens(model.config.grid**2, token_keep, seed=seed, step=step)[view]
    return View(model.project_image(_keep_tokens(tower, kept)), _encode_text(model, batch, cached, view))


def _keep_tokens(tower_output: Tensor, kept: Tensor) -> Tensor:
    """(B, 1+N, width) -> (B, 1+K, width): CLS and the patch tokens `kept` (K,)."""
    if len(kept) == tower_output.shape[1] - 1:
        return tower_output
    rows = torch.cat([torch.zeros(1, dtype=kept.dtype), kept + 1]).to(tower_output.device)
    return tower_output.index_select(1, rows)


def _encode_text(model: ECLIP, batch: Batch, cached: CachedFeatures, view: int) -> Tensor:
    if cached.texts is not None:
        return model.project_text(cached.texts[:, view])
    count = len(batch.product_ids)
    bounds = batch.cu_seqlens[view * count : (view + 1) * count + 1]
    return model.encode_text(batch.tokens[int(bounds[0]) : int(bounds[-1])], bounds - bounds[0])
