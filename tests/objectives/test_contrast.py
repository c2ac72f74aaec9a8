"""The contrastive losses against formulas written out here, and what they hand to the kernels."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import eclip.objectives.contrast
from eclip.kernels.contrastive import contrastive_loss
from eclip.model.eclip import ECLIP
from eclip.objectives.settings import ObjectiveConfig
from tests.objectives.batches import B, compute_losses, make_batch


@pytest.mark.parametrize("soft_labels", ["none", "title", "catalog"])
def test_image_text_loss_against_the_label_matrix(model: ECLIP, soft_labels: str) -> None:
    titles = torch.arange(2 * B).reshape(B, 2)
    titles[3, 0] = titles[5, 0]
    batch = make_batch(title_ids=titles)
    config = ObjectiveConfig(objective="clip", soft_labels=soft_labels)
    got = compute_losses(model, batch, config, step=0, seed=0)["itc"]
    ids = {"none": torch.arange(B), "title": titles[:, 0], "catalog": batch.catalog_ids}[soft_labels]
    labels = (ids[:, None] == ids[None, :]).float()
    labels /= labels.sum(1, keepdim=True)
    images = F.normalize(model.encode_image(batch.images[:, 0]).cls, dim=-1)
    last = int(batch.cu_seqlens[B])
    texts = F.normalize(model.encode_text(batch.tokens[:last], batch.cu_seqlens[: B + 1]), dim=-1)
    scores = images @ texts.T / 0.07
    expected = (F.cross_entropy(scores, labels) + F.cross_entropy(scores.T, labels)) / 2
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_inter_product_loss_ignores_the_same_product(model: ECLIP) -> None:
    """A second image of a product is no negative: changing it leaves the other rows' loss to themselves."""
    twins = torch.arange(B)
    twins[1] = 0
    apart, together = (compute_losses(model, make_batch(product_ids=ids))["inter"] for ids in (torch.arange(B), twins))
    assert together < apart


def test_ranks_know_each_others_rows(model: ECLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both contrastive losses say how many rows each rank has, so that the ranks need not ask."""
    known = []

    def loss(*features: torch.Tensor, **options: Any) -> torch.Tensor:
        known.append(options["rows_per_rank"])
        return contrastive_loss(*features, **options)

    monkeypatch.setattr(eclip.objectives.contrast, "contrastive_loss", loss)
    alone = compute_losses(model, make_batch())
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        grouped = compute_losses(model, make_batch(), group=dist.group.WORLD)
    finally:
        dist.destroy_process_group()
    assert known == [None, None, None, (B,)]  # L_inter compares with gathered keys
    assert all(torch.equal(alone[name], grouped[name]) for name in alone)
