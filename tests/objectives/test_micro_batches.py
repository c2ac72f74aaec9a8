"""An objective's three parts suffice to take a batch in micro-batches: losses and gradients are the whole batch's."""

import dataclasses

import pytest
import torch

from eclip.model.eclip import ECLIP
from eclip.objectives.objective import make_objective
from eclip.objectives.settings import ObjectiveConfig
from eclip.training.momentum import make_momentum
from tests.model.tiny import TINY
from tests.objectives.batches import make_batch
from tests.objectives.micro_batches import accumulate, split

B = 12
WHEN = {"step": 7, "seed": 5}
CONFIGS = {
    "clip": ObjectiveConfig(objective="clip", soft_labels="catalog"),
    "eclip": ObjectiveConfig(),
    "every share": ObjectiveConfig(
        own_image_share=0.3, gaussian_share=0.3, token_keep=0.7, inter_weight=2.0, decoder_warmup_steps=16
    ),
}


def _batch():
    """With a product of two rows and a title of two: positives shared, negatives left out."""
    products, titles = torch.arange(B), torch.arange(2 * B).reshape(B, 2)
    products[4] = products[9]
    titles[2, 0] = titles[7, 0]
    return make_batch(B, product_ids=products, title_ids=titles)


def _gradients(model):
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("name", CONFIGS)
def test_micro_batches_give_the_gradients_of_the_batch(name: str, kernels: str, parts: int) -> None:
    torch.manual_seed(0)
    objective = make_objective(CONFIGS[name])
    model = ECLIP(dataclasses.replace(TINY, kernels=kernels)).double()
    momentum = make_momentum(model)
    with torch.no_grad():
        for parameter in momentum.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        model.matching_head.weight.mul_(20)
    batch = _batch()
    whole = objective.losses(model, momentum, batch, **WHEN)
    whole.pop("loss").backward()
    expected = _gradients(model)

    losses = accumulate(objective, model, momentum, batch, parts, **WHEN)
    found = _gradients(model)

    assert losses.keys() == whole.keys()
    for term, value in whole.items():
        assert value.dtype == torch.float64
        torch.testing.assert_close(losses[term], value, rtol=0, atol=1e-10)
    assert found.keys() == expected.keys()
    for parameter, gradient in expected.items():
        torch.testing.assert_close(found[parameter], gradient, rtol=1e-10, atol=1e-10, msg=lambda m, p=parameter: p + m)


def test_a_split_batch_is_the_batch() -> None:
    batch = _batch()
    parts = split(batch, 3)
    texts = [
        [part.tokens[part.cu_seqlens[i] : part.cu_seqlens[i + 1]] for part in parts for i in rows]
        for rows in (range(4), range(4, 8))
    ]
    assert torch.equal(torch.cat(texts[0] + texts[1]), batch.tokens)
    assert torch.equal(torch.cat([part.images for part in parts if part.images is not None]), batch.images)
