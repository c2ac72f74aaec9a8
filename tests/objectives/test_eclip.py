"""The five losses together: their sum, their gradients and what they depend on."""

import dataclasses

import torch

from eclip.model.eclip import ECLIP
from eclip.objectives.settings import ObjectiveConfig
from tests.model.tiny import TINY
from tests.objectives.batches import compute_losses, make_batch


def test_loss_is_the_weighted_sum_with_a_warm_up(model: ECLIP) -> None:
    config = ObjectiveConfig(
        itc_weight=2, inter_weight=3, itm_weight=5, intra_weight=7, entropy_weight=11, decoder_warmup_steps=8
    )
    losses = compute_losses(model, make_batch(), config)
    terms = 3 * losses["inter"] + 5 * losses["itm"] + 7 * losses["intra"] + 11 * losses["entropy"]
    torch.testing.assert_close(losses["loss"], 2 * losses["itc"] + 4 / 8 * terms)


def test_an_own_image_prompt_has_no_gradient_of_its_own(model: ECLIP) -> None:
    """With every prompt an image, titles do not enter L_inter and the choice of own or other image does."""
    config = ObjectiveConfig(image_prompt_share=1.0)
    other, own = (
        compute_losses(model, make_batch(), dataclasses.replace(config, own_image_share=share)) for share in (0.0, 1.0)
    )
    assert not torch.equal(other["inter"], own["inter"])
    assert torch.equal(other["itc"], own["itc"])


def test_gradients_reach_every_trained_part(model: ECLIP) -> None:
    compute_losses(model, make_batch())["loss"].backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_draws_follow_the_step_and_the_seed(model: ECLIP) -> None:
    batch = make_batch()
    one, again = compute_losses(model, batch), compute_losses(model, batch)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["intra"], compute_losses(model, batch, step=4)["intra"])
    assert not torch.equal(one["intra"], compute_losses(model, batch, seed=6)["intra"])


def test_reference_kernels_give_the_same_losses(model: ECLIP) -> None:
    losses = compute_losses(model, make_batch())
    reference = ECLIP(dataclasses.replace(TINY, kernels="reference"))
    reference.load_state_dict(model.state_dict())
    for name, value in compute_losses(reference, make_batch()).items():
        torch.testing.assert_close(losses[name], value, rtol=1e-4, atol=1e-5)
