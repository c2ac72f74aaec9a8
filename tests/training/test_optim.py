"""Parameter groups and the learning rate's course."""

import dataclasses

import pytest
import torch

from eclip.config import OptimConfig
from eclip.model.eclip import ECLIP
from eclip.presets import PRESETS
from eclip.training.optim import build_optimizer, learning_rate, param_groups, set_learning_rate
from tests.helpers import assert_as_accurate

CONFIG = OptimConfig(learning_rate=1e-3, warmup_steps=10, weight_decay=0.05, tower_learning_rate_scale=0.1)


@pytest.fixture(scope="module")
def model() -> ECLIP:
    return ECLIP(PRESETS["debug"].model)


def _names(model: ECLIP, *, lr_scale: float, decayed: bool) -> set[str]:
    names = {id(p): n for n, p in model.named_parameters()}
    groups = param_groups(model, CONFIG)
    found = [g for g in groups if g["lr_scale"] == lr_scale and (g["weight_decay"] > 0) == decayed]
    assert len(found) <= 1
    return {names[id(p)] for g in found for p in g["params"]}


def test_groups_cover_every_parameter_once(model: ECLIP) -> None:
    grouped = [p for g in param_groups(model, CONFIG) for p in g["params"]]
    assert len(grouped) == len({id(p) for p in grouped}) == len(list(model.parameters()))


def test_no_decay_on_norms_biases_scale_and_embeddings_of_place(model: ECLIP) -> None:
    free = _names(model, lr_scale=1.0, decayed=False) | _names(model, lr_scale=0.1, decayed=False)
    for name, parameter in model.named_parameters():
        special = ("norm" in name, name.endswith("bias"), "scale" in name, "pos" in name, "cls_token" in name)
        assert (name in free) == (any(special) or name in ("queries.position", "queries.modality")), name
        assert name in free or parameter.ndim >= 2


def test_towers_learn_slower(model: ECLIP) -> None:
    slow = _names(model, lr_scale=0.1, decayed=True) | _names(model, lr_scale=0.1, decayed=False)
    assert slow == {n for n, _ in model.named_parameters() if n.startswith(("image_encoder.", "text_encoder."))}
    optimizer = build_optimizer(model, CONFIG)
    set_learning_rate(optimizer, 0.5)
    assert {g["lr"] for g in optimizer.param_groups} == {0.5, 0.05}


def test_locked_parameters_are_left_out() -> None:
    model = ECLIP(PRESETS["debug"].model)
    model.image_encoder.requires_grad_(False)
    grouped = {id(p) for g in param_groups(model, CONFIG) for p in g["params"]}
    assert not grouped & {id(p) for p in model.image_encoder.parameters()}
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="locked"):
        param_groups(model, CONFIG)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_schedule(schedule: str) -> None:
    config = dataclasses.replace(CONFIG, schedule=schedule)
    rates = [learning_rate(step, 110, config) for step in range(111)]
    assert rates[0] == pytest.approx(1e-4)
    assert rates[9] == rates[10] == max(rates) == pytest.approx(1e-3)
    assert rates[60] == pytest.approx(5e-4)  # half-way down, for both
    assert rates[35] == pytest.approx(7.5e-4 if schedule == "linear" else 1e-3 * (0.5 + 0.5 * 2**-0.5))
    assert rates[110] == pytest.approx(0, abs=1e-12)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))


def test_schedule_of_a_run_shorter_than_its_warmup() -> None:
    assert [learning_rate(s, 2, CONFIG) for s in range(2)] == pytest.approx([5e-4, 1e-3])
    assert learning_rate(0, 5, dataclasses.replace(CONFIG, warmup_steps=0)) == 1e-3


def test_a_fused_step_is_as_accurate_as_a_plain_one(model: ECLIP) -> None:
    """Both against AdamW in float64, after three steps on the same gradients."""
    found = {}
    kinds = {"fused": (torch.float32, None), "plain": (torch.float32, False), "exact": (torch.float64, False)}
    for name, (dtype, fused) in kinds.items():
        torch.manual_seed(0)
        copy = ECLIP(PRESETS["debug"].model).to(dtype)
        optimizer = build_optimizer(copy, CONFIG)
        if fused is None:
            assert all(group["fused"] for group in optimizer.param_groups)
        else:
            optimizer = torch.optim.AdamW(param_groups(copy, CONFIG), lr=1e-3, betas=(0.9, 0.98), fused=fused)
        for _ in range(3):
            for p in copy.parameters():
                p.grad = torch.randn(p.shape).to(dtype)
            optimizer.step()
        found[name] = torch.cat([p.detach().flatten() for p in copy.parameters()])
    assert_as_accurate(found["fused"], found["plain"], found["exact"])


def test_adamw_takes_the_configured_values(model: ECLIP) -> None:
    optimizer = build_optimizer(model, dataclasses.replace(CONFIG, beta2=0.95))
    assert isinstance(optimizer, torch.optim.AdamW)
    assert all(g["betas"] == (0.9, 0.95) for g in optimizer.param_groups)
