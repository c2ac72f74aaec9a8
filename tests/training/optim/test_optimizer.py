"""The default optimizer's bits, steps that are skipped on the device, and what a checkpoint holds of each optimizer."""

import copy
import dataclasses
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from eclip.config import OptimConfig, RunConfig
from eclip.model.eclip import ECLIP
from eclip.presets import PRESETS
from eclip.train import train
from eclip.training.checkpoint import load_checkpoint, save_checkpoint
from eclip.training.momentum import make_momentum, update_momentum
from eclip.training.optim import (
    build_optimizer,
    check_optimizer,
    describe_switch,
    fresh_state,
    param_groups,
    step_if_finite,
)
from tests.helpers import assert_as_accurate
from tests.host_waits import no_host_waits
from tests.training.optim import apex_stand_in
from tests.training.run_folders import ALONE, assert_refused, make_config, metrics_lines

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

CONFIG = OptimConfig(learning_rate=1e-3, warmup_steps=10, weight_decay=0.05, tower_learning_rate_scale=0.1)
KINDS = ("adamw", "apex_adam", "muon")


@pytest.fixture(autouse=True)
def _apex(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in apex_stand_in.modules().items():
        monkeypatch.setitem(sys.modules, name, module)


def _make(kind: str = "adamw", **changes: Any) -> tuple[ECLIP, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = ECLIP(PRESETS["debug"].model)
    return model, build_optimizer(model, dataclasses.replace(CONFIG, optimizer=kind, **changes))


class NoReads(TorchDispatchMode):
    """Fails where the host reads a tensor's value."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert "_local_scalar_dense" not in str(func), func
        return func(*args, **(kwargs or {}))


def _give_gradients(model: nn.Module, seed: int, *, value: float | None = None) -> None:
    torch.manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, dtype=p.dtype) if value is None else torch.full_like(p, value)


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for p in model.parameters():
        yield p.detach().clone()
        yield from (value.clone() for value in optimizer.state[p].values())


def test_a_fused_step_is_as_accurate_as_a_plain_one() -> None:
    """Both against AdamW in float64, after three steps on the same gradients."""
    found = {}
    kinds = {"fused": (torch.float32, None), "plain": (torch.float32, False), "exact": (torch.float64, False)}
    for name, (dtype, fused) in kinds.items():
        model, _ = _make()
        model = model.to(dtype)
        optimizer = build_optimizer(model, CONFIG)
        if fused is None:
            assert all(group["fused"] for group in optimizer.param_groups)
        else:
            optimizer = torch.optim.AdamW(param_groups(model, CONFIG), lr=1e-3, betas=(0.9, 0.98), fused=fused)
        for step in range(3):
            torch.manual_seed(step)
            for p in model.parameters():
                p.grad = torch.randn(p.shape).to(dtype)
            optimizer.step()
        found[name] = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert_as_accurate(found["fused"], found["plain"], found["exact"])


@pytest.mark.parametrize("kind", KINDS)
def test_takes_the_configured_values(kind: str) -> None:
    _, optimizer = _make(kind, beta2=0.95)
    adam = [g for g in optimizer.param_groups if not g["muon"]]
    assert adam
    assert all(g["betas"] == (0.9, 0.95) and g["eps"] == 1e-8 and g["lr"] == 1e-3 for g in adam)
    assert isinstance(optimizer, torch.optim.AdamW) == (kind == "adamw")


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_that_is_not_finite_changes_nothing(kind: str) -> None:
    """At any time: as the first step, between others, and without leaving a trace in those that follow."""
    model, optimizer = _make(kind)
    other, plain = _make(kind)
    yes, no = torch.tensor(True), torch.tensor(False)
    for seed in range(4):
        for value in (float("nan"), float("inf"), 1.0):
            before = list(_tensors(model, optimizer)) if seed else [p.detach().clone() for p in model.parameters()]
            _give_gradients(model, seed, value=value)
            step_if_finite(optimizer, no)
            after = list(_tensors(model, optimizer)) if seed else [p.detach() for p in model.parameters()]
            assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
        _give_gradients(model, seed)
        step_if_finite(optimizer, yes)
        _give_gradients(other, seed)
        plain.step()  # to the bit what a step was before
        assert all(torch.equal(a, b) for a, b in zip(_tensors(model, optimizer), _tensors(other, plain), strict=True))
    assert not hasattr(optimizer, "found_inf")


def test_adamw_does_not_wait_for_the_device() -> None:
    """`finite` is never read by the host; torch's fused step takes no meta tensors, so reads are watched on the CPU."""
    model, optimizer = _make()
    momentum = make_momentum(model)
    _give_gradients(model, 0)
    with NoReads():
        step_if_finite(optimizer, torch.tensor(True))
        update_momentum(model, momentum, 0.9, finite=torch.tensor(True))
        with pytest.raises(AssertionError, match="_local_scalar_dense"):
            bool(torch.tensor(True))


@pytest.mark.gpu
def test_a_gpu_is_not_waited_for() -> None:
    model, _ = _make()
    model.cuda()
    optimizer, momentum = build_optimizer(model, CONFIG), make_momentum(model)
    answers = [torch.tensor(answer, device="cuda") for answer in (True, False, True)]
    for i, finite in enumerate(answers):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        before = [p.detach().clone() for p in (*model.parameters(), *momentum.parameters())]
        with no_host_waits(torch.device("cuda")) if i else nullcontext():  # the first call makes the state
            step_if_finite(optimizer, finite)
            update_momentum(model, momentum, 0.9, finite=finite)
        after = [*model.parameters(), *momentum.parameters()]
        assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True)) != bool(finite)


def test_the_momentum_model_moves_with_the_model_alone() -> None:
    model, _ = _make()
    momentum = make_momentum(model)
    for p in model.parameters():
        p.data.add_(torch.randn_like(p))
    before = [p.clone() for p in momentum.parameters()]
    update_momentum(model, momentum, 0.99, finite=torch.tensor(False))
    assert all(torch.equal(a, b) for a, b in zip(momentum.parameters(), before, strict=True))
    other = copy.deepcopy(momentum)
    update_momentum(model, momentum, 0.99, finite=torch.tensor(True))
    update_momentum(model, other, 0.99)
    assert all(torch.equal(a, b) for a, b in zip(momentum.parameters(), other.parameters(), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(momentum.parameters(), before, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_fresh_state_is_that_of_a_first_step(kind: str) -> None:
    model, optimizer = _make(kind)
    _give_gradients(model, 0)
    optimizer.step()
    for p in model.parameters():
        made, fresh = optimizer.state[p], fresh_state(optimizer, p)
        assert list(made) == list(fresh)
        for key, value in fresh.items():
            assert (value.shape, value.dtype, value.device) == (made[key].shape, made[key].dtype, made[key].device)
            assert not value.any()


@pytest.mark.parametrize("new", KINDS)
@pytest.mark.parametrize("old", KINDS)
def test_another_optimizer_keeps_what_fits(old: str, new: str, tmp_path: Path) -> None:
    model, optimizer = _make(old)
    for seed in range(2):
        _give_gradients(model, seed)
        optimizer.step()
    path = save_checkpoint(tmp_path, 2, model, None, optimizer, {}, ALONE)
    torch.manual_seed(1)
    resumed, other = _make(new)
    load_checkpoint(path, resumed, None, other, ALONE)
    for (name, p), q in zip(model.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)
        kept = optimizer.state[p] if list(fresh_state(other, q)) == list(optimizer.state[p]) else {}
        assert list(other.state.get(q, {})) == list(kept), name
        assert all(torch.equal(other.state[q][key], value) for key, value in kept.items())
    for m, o in ((model, optimizer), (resumed, other)):
        _give_gradients(m, 2)
        o.step()
    same = [
        torch.allclose(p, q, rtol=0, atol=1e-6) for p, q in zip(model.parameters(), resumed.parameters(), strict=True)
    ]
    assert all(same) == (("muon" in (old, new)) <= (old == new))
    said = describe_switch(OptimConfig(optimizer=old), OptimConfig(optimizer=new))
    assert (said is None) == (old == new)
    if said is not None:
        assert said.startswith(f"--optimizer {new} after {old}: ")
        assert ("start without momentum" in said) == (not all(same))


def test_a_run_goes_on_with_another_optimizer(
    twelve_products: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(twelve_products, tmp_path, optimizer="muon", log_every=1)
    assert train(config, ALONE)
    capsys.readouterr()
    assert train(make_config(twelve_products, tmp_path, steps=4, resume=True, optimizer="adamw", log_every=1), ALONE)
    output = capsys.readouterr()
    said = output.out + output.err
    assert "optimizer muon -> adamw" in said
    assert "the matrices of the blocks start without momentum, the moments of the rest are kept" in said
    assert len(metrics_lines(tmp_path)) == 4


@pytest.mark.parametrize("kind", ["apex_adam", "muon"])
def test_what_works_on_gpus_alone_is_not_offloaded(kind: str, tmp_path: Path) -> None:
    config = make_config(tmp_path, tmp_path / "run", optimizer=kind, cpu_offload=True)
    assert_refused(config, f"--optimizer {kind} with --cpu-offload")
    check_optimizer(make_config(tmp_path, tmp_path / "run", cpu_offload=True))


def test_layer_decay_of_towers_that_do_not_learn_is_refused(tmp_path: Path) -> None:
    def config(**changes: Any) -> RunConfig:
        locks = {"lock_image": True, "lock_text": True, "vision_depth": 2, "text_depth": 2}
        return make_config(tmp_path, tmp_path / "run", **locks, **changes)

    assert_refused(config(layer_decay=0.5), "--layer-decay 0.5 with --lock-image and --lock-text")
    check_optimizer(config(layer_decay=0.5, unlock_last=1))
    check_optimizer(config())
