"""L_itm draws its mismatch among the titles that are hard to tell apart."""

import dataclasses

import torch
import torch.nn.functional as F

from eclip.model.eclip import ECLIP
from eclip.objectives.draws import draw_prompts
from eclip.objectives.matching import matching_loss
from tests.objectives.batches import DEFAULT, B, T


def test_matching_loss_prefers_hard_titles(model: ECLIP) -> None:
    """With one title far closer than the others, it is the negative that is drawn."""
    draw = draw_prompts(B, range(B), T, DEFAULT, seed=0, step=0)
    instances = F.normalize(torch.randn(B, 16), dim=-1)
    pool = -instances.roll(1, 0)
    hard = draw.products[torch.arange(B), (draw.positive + 1) % T]
    with torch.no_grad():
        model.logit_scale.fill_(10)  # clamped at 100
        loss = matching_loss(
            model, instances[:1], pool[:1], pool.index_copy(0, hard[:1], instances[:1]),
            dataclasses.replace(draw, products=draw.products[:1], positive=draw.positive[:1], gumbel=draw.gumbel[:1]),
            torch.zeros(1, T, dtype=torch.bool),
        )  # fmt: skip
        matched = model.match(F.normalize(instances[:1], dim=-1) * F.normalize(pool[:1], dim=-1) * 16)
        unmatched = model.match(instances[:1] ** 2 * 16)
        expected = (
            F.cross_entropy(matched, torch.ones(1).long()) + F.cross_entropy(unmatched, torch.zeros(1).long())
        ) / 2
    torch.testing.assert_close(loss, expected)
