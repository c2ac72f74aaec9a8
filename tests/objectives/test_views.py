"""Cached outputs stand for the towers, and dropped tokens take no part."""

import torch

from eclip.model.eclip import ECLIP
from eclip.objectives.draws import draw_tokens
from eclip.objectives.settings import ObjectiveConfig
from eclip.objectives.views import CachedFeatures
from tests.objectives.batches import B, compute_losses, make_batch


def test_cached_features_give_the_same_losses(model: ECLIP) -> None:
    batch = make_batch()
    images = model.image_tower(batch.images.flatten(0, 1)).unflatten(0, (B, 2))
    texts = model.text_tower(batch.tokens, batch.cu_seqlens).unflatten(0, (2, B)).transpose(0, 1)
    cached = compute_losses(model, batch, cached=CachedFeatures(images, texts))
    for name, value in compute_losses(model, batch).items():
        torch.testing.assert_close(cached[name], value)


def test_dropped_tokens_take_no_part_but_cls_does(model: ECLIP) -> None:
    """The losses see only the kept tokens: others may be anything. CLS always counts."""
    config = ObjectiveConfig(token_keep=0.4)
    batch = make_batch()
    images = model.image_tower(batch.images.flatten(0, 1)).unflatten(0, (B, 2)).detach()
    kept = draw_tokens(16, 0.4, seed=5, step=3)
    assert kept is not None
    changed = images.clone()
    for view in (0, 1):
        dropped = torch.ones(17, dtype=torch.bool)
        dropped[torch.cat([torch.zeros(1, dtype=torch.long), kept[view] + 1])] = False
        changed[:, view, dropped] = 100.0
    one, two = (compute_losses(model, batch, config, cached=CachedFeatures(x, None)) for x in (images, changed))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert torch.equal(one["itc"], compute_losses(model, batch)["itc"])
