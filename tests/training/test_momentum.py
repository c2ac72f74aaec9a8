"""The EMA model: what is copied, what is shared, and the update against its formula."""

import pytest
import torch
from torch import nn

from eclip.model.eclip import ECLIP
from eclip.presets import PRESETS
from eclip.training.momentum import keep_locked_in_eval, make_momentum, update_momentum


@pytest.fixture
def model() -> ECLIP:
    torch.manual_seed(0)
    return ECLIP(PRESETS["debug"].model)


def test_a_copy_without_gradients(model: ECLIP) -> None:
    momentum = make_momentum(model)
    assert not momentum.training
    assert model.training
    for (name, p), m in zip(model.named_parameters(), momentum.parameters(), strict=True):
        assert m is not p, name
        assert torch.equal(m, p)
        assert p.requires_grad
        assert not m.requires_grad


def test_locked_towers_are_shared(model: ECLIP) -> None:
    model.image_encoder.requires_grad_(False)
    momentum = make_momentum(model)
    assert momentum.image_encoder is model.image_encoder
    assert momentum.text_encoder is not model.text_encoder
    assert all(p.requires_grad for p in model.text_encoder.parameters())


def test_update_follows_the_formula(model: ECLIP) -> None:
    model.image_encoder.requires_grad_(False)
    momentum = make_momentum(model)
    locked = [p.clone() for p in model.image_encoder.parameters()]
    expected = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            old = p.detach().clone()
            p.data.add_(torch.randn_like(p))
            expected[name] = 0.9 * old + 0.1 * p.detach()
    update_momentum(model, momentum, 0.9)
    for name, m in momentum.named_parameters():
        if name in expected:
            torch.testing.assert_close(m, expected[name], rtol=1e-6, atol=1e-6)
    for p, before in zip(model.image_encoder.parameters(), locked, strict=True):
        assert torch.equal(p, before)


def test_limits(model: ECLIP) -> None:
    momentum = make_momentum(model)
    model.logit_scale.data.add_(1)
    update_momentum(model, momentum, 1.0)
    assert momentum.logit_scale != model.logit_scale
    update_momentum(model, momentum, 0.0)
    assert momentum.logit_scale == model.logit_scale


def test_what_is_locked_stays_in_eval_mode_however_deep() -> None:
    locked, free = nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2)
    outer = nn.Sequential(nn.Linear(2, 2), nn.Sequential(locked, free))
    keep_locked_in_eval(outer.train())
    assert [module for module in outer.modules() if not module.training] == [locked]
