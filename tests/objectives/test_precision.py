"""Losses are float32 whatever autocast makes of the model."""

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from eclip.model.eclip import ECLIP
from eclip.objectives.contrast import contrast, unit
from eclip.objectives.draws import draw_prompts
from eclip.objectives.intra_product import intra_product_loss
from eclip.objectives.matching import matching_loss
from tests.model.tiny import TINY
from tests.objectives.batches import DEFAULT, T, compute_losses, make_batch


def _intra(model: ECLIP, slots: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    excluded = torch.zeros(slots.shape[:2], dtype=torch.bool)
    return intra_product_loss(slots, texts, torch.arange(len(slots)) % T, excluded, 0.02)


def _matching(model: ECLIP, slots: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    draw = draw_prompts(len(texts), range(len(texts)), T, DEFAULT, seed=0, step=0)
    excluded = torch.zeros(slots.shape[:2], dtype=torch.bool)
    return matching_loss(model, slots[:, 0], texts, texts, draw, excluded)


def _contrastive(model: ECLIP, slots: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    return contrast(unit(slots[:, 0]), unit(texts), torch.tensor(100.0), model.config.kernels, None)


# Not the contrastive kernels: they take autocast's dtype for their operands, on purpose.
@pytest.mark.parametrize(
    ("loss", "kernels"),
    [
        (_intra, "auto"),
        (_intra, "reference"),
        (_matching, "auto"),
        (_matching, "reference"),
        (_contrastive, "reference"),
    ],
)
def test_products_of_the_losses_are_float32_under_autocast(loss: Any, kernels: str) -> None:
    """Values and gradients are those without autocast: bfloat16 would change the third digit."""
    torch.manual_seed(0)
    model = ECLIP(dataclasses.replace(TINY, kernels=kernels))
    model.matching_head.weight.data.mul_(20)
    rows = torch.randn(16, T, TINY.embed_dim), torch.randn(16, TINY.embed_dim)
    found = []
    for autocast in (True, False):
        inputs = [x.clone().requires_grad_() for x in rows]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            value = loss(model, *inputs)
        value.backward()
        found.append((value, *(x.grad for x in inputs)))
    for cast, plain in zip(*found, strict=True):
        assert cast.dtype == torch.float32
        torch.testing.assert_close(cast, plain, rtol=1e-6, atol=1e-7)
    if loss is _intra:
        slots, texts = (F.normalize(x.double(), dim=-1) for x in rows)
        exact = F.cross_entropy(torch.einsum("btd,bd->bt", slots, texts) / 0.02, torch.arange(16) % T)
        assert found[0][0].item() == pytest.approx(exact.item(), rel=1e-6)


def test_losses_under_autocast(model: ECLIP) -> None:
    """Float32 scalars near those without it, and a gradient for the temperature."""
    exact = compute_losses(model, make_batch())
    with torch.autocast("cpu", torch.bfloat16):
        losses = compute_losses(model, make_batch())
    for name, value in losses.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, exact[name], rtol=0.03, atol=0.03)
    losses["itc"].backward()
    assert model.logit_scale.grad is not None and model.logit_scale.grad.isfinite().all()
