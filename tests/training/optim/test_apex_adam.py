"""FusedAdam behind ApexAdam: AdamW's results, and what is said where apex is not NVIDIA's."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from eclip.config import OptimConfig
from eclip.model.eclip import ECLIP
from eclip.presets import PRESETS
from eclip.training.optim import build_optimizer, check_optimizer, set_learning_rate
from eclip.training.optim.apex_adam import ApexAdam, check_apex
from tests.training.optim import apex_stand_in
from tests.training.run_folders import assert_refused, make_config

SETTINGS = {"learning_rate": 1e-3, "weight_decay": 0.05, "tower_learning_rate_scale": 0.1, "layer_decay": 0.8}


def _install(monkeypatch: pytest.MonkeyPatch, **fused_adam: Any) -> None:
    for name, module in apex_stand_in.modules(**fused_adam).items():
        monkeypatch.setitem(sys.modules, name, module)


def test_same_as_adamw(monkeypatch: pytest.MonkeyPatch) -> None:
    """With learning rates that change, and parameters that get a gradient in some steps only."""
    _install(monkeypatch)
    models = []
    for kind in ("adamw", "apex_adam"):
        torch.manual_seed(0)
        model = ECLIP(PRESETS["debug"].model)
        optimizer = build_optimizer(model, OptimConfig(optimizer=kind, **SETTINGS))
        assert isinstance(optimizer, ApexAdam) == (kind == "apex_adam")
        for step in range(5):
            torch.manual_seed(step)
            for i, p in enumerate(model.parameters()):
                gradient = torch.randn(p.shape)
                p.grad = gradient if (i + step) % 7 or step % 2 else None
            set_learning_rate(optimizer, 1e-3 * (step + 1))
            optimizer.step()
        models.append((model, optimizer))
    (one, adamw), (other, apex) = models
    for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-6, atol=1e-6, msg=name)
        for key, value in adamw.state[p].items():
            torch.testing.assert_close(apex.state[q][key], value, rtol=1e-6, atol=1e-6, msg=f"{name} {key}")
    counts = {float(state["step"]) for state in apex.state.values()}
    assert len(counts) > 1


def test_storage_is_shared_and_gradients_stay_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch)
    layer = nn.Linear(3, 2)
    optimizer = build_optimizer(layer, OptimConfig(optimizer="apex_adam"))
    places = [p.data_ptr() for p in layer.parameters()]
    for p in layer.parameters():
        p.grad = torch.ones_like(p)
    before = layer.weight.detach().clone()
    optimizer.step()
    assert [p.data_ptr() for p in layer.parameters()] == places
    assert not torch.equal(layer.weight, before)
    assert torch.equal(layer.weight.grad, torch.ones(2, 3))
    layer.weight.data = layer.weight.data.clone()  # as FSDP2 may do: the next step finds the new place
    before = layer.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(layer.weight, before)
    optimizer.zero_grad()
    optimizer.step()  # nothing has a gradient


@pytest.mark.gpu
def test_nvidias_own_takes_adamws_steps() -> None:
    try:
        check_apex()
    except ValueError as error:
        pytest.skip(str(error))
    layers = []
    for kind in ("adamw", "apex_adam"):
        torch.manual_seed(0)
        layer = nn.Sequential(nn.Linear(300, 70), nn.Linear(70, 1)).cuda()
        optimizer = build_optimizer(layer, OptimConfig(optimizer=kind, **SETTINGS))
        for _ in range(5):
            for p in layer.parameters():
                p.grad = torch.randn(p.shape).cuda()
            optimizer.step()
        layers.append(layer)
    for p, q in zip(*(layer.parameters() for layer in layers), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-6, atol=1e-6)


def _refuse(*args: object, **options: object) -> None:
    raise RuntimeError("apex.optimizers.FusedAdam requires cuda extensions\nand more")


class _Broken(apex_stand_in.FusedAdam):
    def __init__(self, *args: Any, **options: Any) -> None:
        _refuse()


def _check_says(tmp_path: Path, words: str) -> None:
    config = make_config(tmp_path, tmp_path / "run", optimizer="apex_adam")
    with pytest.raises(ValueError, match=words) as error:
        check_optimizer(config)
    assert "\n" not in str(error.value)
    assert_refused(config, words)


@pytest.mark.parametrize("missing", [True, False])
def test_the_package_of_that_name_is_told_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, missing: bool) -> None:
    """The index's apex is a toolkit for web pages: it has no `optimizers`, and may not even be importable."""
    modules = apex_stand_in.modules()
    monkeypatch.setitem(sys.modules, "apex", None if missing else modules["apex"])
    monkeypatch.delitem(sys.modules, "apex.optimizers", raising=False)
    _check_says(tmp_path, r"no NVIDIA apex here \(ModuleNotFoundError.*build it from NVIDIA's source.*index is another")


def test_a_class_that_is_no_optimizer_is_told_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _install(monkeypatch, fused_adam=_refuse)
    _check_says(tmp_path, "is no optimizer of PyTorch's; build apex from NVIDIA's source")


def test_apex_without_its_extensions_is_found_before_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _install(monkeypatch, fused_adam=_Broken)
    _check_says(tmp_path, r"does not work here \(apex.optimizers.FusedAdam requires cuda extensions\); build apex")


def test_what_works_is_not_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _install(monkeypatch)
    check_optimizer(make_config(tmp_path, tmp_path / "run", optimizer="apex_adam"))
