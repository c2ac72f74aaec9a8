"""Muon of whole matrices, AdamW of the rest, in one optimizer."""

import dataclasses

import pytest
import torch
from torch import nn

from eclip.config import OptimConfig
from eclip.model.eclip import ECLIP
from eclip.presets import PRESETS
from eclip.training.optim import build_optimizer, param_groups, set_learning_rate

CONFIG = OptimConfig(optimizer="muon", learning_rate=1e-3, weight_decay=0.05, tower_learning_rate_scale=0.5)


def _make(config: OptimConfig = CONFIG) -> ECLIP:
    torch.manual_seed(0)
    return ECLIP(PRESETS["debug"].model)


def _give_gradients(model: nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape)


def test_matrices_take_the_steps_of_torchs_muon_and_the_rest_those_of_adamw() -> None:
    model, other = _make(), _make()
    optimizer = build_optimizer(model, CONFIG)
    groups = param_groups(other, CONFIG)
    muon = torch.optim.Muon([g for g in groups if g["muon"]], adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW([g for g in groups if not g["muon"]], betas=(0.9, 0.98), fused=True)
    for seed in range(4):
        for m, optimizers in ((model, [optimizer]), (other, [muon, adamw])):
            _give_gradients(m, seed)
            for o in optimizers:
                set_learning_rate(o, 1e-3 * (seed + 1))
                o.step()
    matrices = {id(p) for g in optimizer.param_groups if g["muon"] for p in g["params"]}
    for (name, p), q in zip(model.named_parameters(), other.named_parameters(), strict=True):
        if id(p) in matrices:
            torch.testing.assert_close(p, q[1], rtol=0, atol=1e-7, msg=name)
        else:
            assert torch.equal(p, q[1]), name
    assert {len(optimizer.state[p]) for p in model.parameters()} == {1, 3}


def test_a_step_has_the_size_of_adamws() -> None:
    """So that one learning rate serves both: 0.2 of it, root mean square, whatever the shape (Liu et al. 2025)."""
    model, before = _make(), _make()
    optimizer = build_optimizer(model, dataclasses.replace(CONFIG, weight_decay=0.0, tower_learning_rate_scale=1.0))
    _give_gradients(model, 0)
    set_learning_rate(optimizer, 1.0)
    optimizer.step()
    for name, parameter in model.named_parameters():
        if ".blocks." in name and parameter.ndim == 2:
            moved = (parameter - before.get_parameter(name)).detach()
            assert 0.1 < float(moved.square().mean().sqrt()) < 0.3, name


def test_a_matrix_without_gradient_stays() -> None:
    model = _make()
    optimizer = build_optimizer(model, CONFIG)
    _give_gradients(model, 0)
    quiet = model.image_encoder.blocks[0].attn.qkv.weight
    quiet.grad, before = None, quiet.detach().clone()
    optimizer.step()
    assert torch.equal(quiet, before)
    assert not optimizer.state.get(quiet)
    optimizer.zero_grad(set_to_none=True)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("shape", [(1, 5), (5, 1), (4, 4), (3, 9)])
def test_the_update_is_orthogonal(shape: tuple[int, int]) -> None:
    """Singular values near 1 (torch's five iterations: 0.5 to 1.5) times the learning rate's adjustment."""
    tower = nn.Module()
    tower.blocks = nn.ModuleList([nn.Linear(shape[1], shape[0])])
    layers = nn.ModuleDict({"tower": tower})
    optimizer = build_optimizer(layers, dataclasses.replace(CONFIG, weight_decay=0.0))
    weight = tower.blocks[0].weight
    before = weight.detach().clone()
    _give_gradients(layers, 3)
    set_learning_rate(optimizer, 1.0)
    optimizer.step()
    values = torch.linalg.svdvals(before - weight.detach()) / (0.2 * max(shape) ** 0.5)
    assert values.min() > 0.4 and values.max() < 1.6
