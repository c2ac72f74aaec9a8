"""A step in micro-batches has the losses and the gradients of the whole batch, on any number of ranks."""

import dataclasses
import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor

from eclip.config import RunConfig
from eclip.model.eclip import ECLIP
from eclip.objectives.clip import ClipObjective
from eclip.objectives.settings import ObjectiveConfig
from eclip.objectives.views import View
from eclip.presets import PRESETS
from eclip.training.accumulation import accumulate
from eclip.training.momentum import make_momentum
from eclip.training.step import TrainStep
from tests.helpers import run_torchrun
from tests.model.tiny import TINY
from tests.objectives.batches import make_batch
from tests.training.parts import make_parts
from tests.training.run_folders import ALONE, metrics_lines

B = 12
CONFIGS = {
    "clip": ObjectiveConfig(objective="clip", soft_labels="catalog"),
    "eclip": ObjectiveConfig(),
    "every share": ObjectiveConfig(
        own_image_share=0.3, gaussian_share=0.3, token_keep=0.7, inter_weight=2.0, decoder_warmup_steps=16
    ),
    "one loss": ObjectiveConfig(itc_weight=0.0, itm_weight=0.0, intra_weight=0.0, entropy_weight=0.0),
}


def _batch():
    """With a product of two rows and a title of two: positives shared, negatives left out."""
    products, titles = torch.arange(B), torch.arange(2 * B).reshape(B, 2)
    products[4] = products[9]
    titles[2, 0] = titles[7, 0]
    return dataclasses.replace(make_batch(B, product_ids=products, title_ids=titles), step=7)


def _step(config: ObjectiveConfig, kernels: str = "auto", dtype: torch.dtype = torch.float64) -> TrainStep:
    torch.manual_seed(0)
    run: RunConfig = dataclasses.replace(PRESETS["debug"], objective=config)
    model = ECLIP(dataclasses.replace(TINY, kernels=kernels)).to(dtype)
    momentum = make_momentum(model) if config.objective == "eclip" else None
    step = TrainStep(model, momentum, run, ALONE).train()
    step.objective.lock_unused(model)
    with torch.no_grad():
        for parameter in () if momentum is None else momentum.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        model.matching_head.weight.mul_(20)
    return step


def _take(step: TrainStep, parts: int, *, observe: bool = False) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Losses and gradients of a step."""
    made = make_parts(_batch(), parts, step.objective, TINY)
    if parts == 1:
        losses = step("losses", made[0], observe=observe)
        losses["loss"].backward()
    else:
        losses = accumulate(step, step, made, lambda last: nullcontext(), observe=observe)
    gradients = {name: p.grad for name, p in step.model.named_parameters() if p.grad is not None}
    step.zero_grad(set_to_none=True)
    return losses, gradients


@pytest.mark.parametrize("parts", [2, 3, 4, 12])
@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("name", CONFIGS)
def test_micro_batches_give_losses_and_gradients_of_the_batch(name: str, kernels: str, parts: int) -> None:
    step = _step(CONFIGS[name], kernels)
    whole, expected = _take(step, 1)
    losses, found = _take(step, parts)
    assert list(losses) == list(whole)
    for term, value in whole.items():
        assert value.dtype == torch.float64
        torch.testing.assert_close(losses[term], value, rtol=0, atol=1e-12)
        assert not losses[term].requires_grad
    assert found.keys() == expected.keys()
    for parameter, gradient in expected.items():
        torch.testing.assert_close(found[parameter], gradient, rtol=1e-11, atol=1e-12, msg=lambda m, p=parameter: p + m)


def test_what_is_observed_is_the_mean_of_the_parts() -> None:
    """And looking changes no loss."""
    step = _step(ObjectiveConfig())
    (plain, _), (whole, _), (split, _) = _take(step, 1), _take(step, 1, observe=True), _take(step, 3, observe=True)
    assert set(whole) - set(plain) == {"positive_share"}
    assert all(torch.equal(whole[name], value) for name, value in plain.items())
    assert 0 < whole["positive_share"] < 1
    torch.testing.assert_close(split["positive_share"], whole["positive_share"])


def test_what_waits_between_the_passes_is_no_graph_and_no_slice() -> None:
    """Of the whole batch, the pass without gradient keeps features; patch tokens only of the momentum model's view."""
    step = _step(ObjectiveConfig())
    found = step("encode", make_parts(_batch(), 3, step.objective, TINY)[0])
    floats = [x for x in (*found.pairs.values(), *found.pool.values(), found.scale) if x.is_floating_point()]
    for tensor in floats:
        assert not tensor.requires_grad
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


class _Unscaled(ClipObjective):
    """A pair loss that knows no temperature, and looks at images alone."""

    def pair_losses(self, pairs: dict[str, Tensor], *_: object, **__: object) -> dict[str, Tensor]:
        return {"itc": (pairs["image"] @ pairs["image"].T).logsumexp(1).mean()}


class _Uncoupled(ClipObjective):
    """All its losses are means over rows."""

    def pair_losses(self, *_: object, **__: object) -> dict[str, Tensor]:
        return {}

    def local_losses(self, model: object, batch: object, view: View, *_: object, **__: object) -> dict[str, Tensor]:
        return {"itc": view.image.cls.square().mean()}


@pytest.mark.parametrize("kind", [_Unscaled, _Uncoupled])
def test_an_objective_may_couple_rows_in_its_own_way_or_not_at_all(kind: type[ClipObjective]) -> None:
    step = _step(CONFIGS["clip"])
    step.objective = kind(CONFIGS["clip"])
    (whole, expected), (losses, found) = _take(step, 1), _take(step, 3)
    torch.testing.assert_close(losses["loss"], whole["loss"], rtol=0, atol=1e-12)
    for parameter, gradient in expected.items():
        torch.testing.assert_close(found[parameter], gradient, rtol=1e-11, atol=1e-12)


_RUNS = Path(__file__).parent / "accumulation_runs.py"


@pytest.mark.parametrize(("ranks", "shard"), [(1, "full"), (2, "full"), (2, "none"), (4, "full")])
def test_any_number_of_ranks_and_micro_batches_trains_the_same_weights(
    ranks: int, shard: str, twelve_products: Path, tmp_path: Path
) -> None:
    """Five steps in float64, of a batch whole on one process, and in 1, 2 and 3 parts on 1, 2 and 4 ranks."""
    run_torchrun(_RUNS, str(twelve_products), str(tmp_path), shard, ranks=ranks, timeout=300)
    report = json.loads((tmp_path / "differences.json").read_text())
    assert report["parts"] == [1, 2, 3]
    assert max(report["weights"]) < 1e-10, report
    assert max(report["losses"]) < 1e-6, report  # the log is float32


def test_the_command_trains_the_same_losses(twelve_products: Path, tmp_path: Path) -> None:
    """In float32, as a user does it: two ranks, each its six rows at once or two at a time."""
    lines = {}
    for name, flags in {"whole": (), "split": ("--micro-batch", "2")}.items():
        run_dir = tmp_path / name
        command = ["--preset", "debug", "--steps", "5", "--global-batch-size", "12", "--no-evaluate", *flags]
        command += ["--data-dir", str(twelve_products), "--run-dir", str(run_dir)]
        run_torchrun("-m", "eclip.train", *command, timeout=240)
        lines[name] = metrics_lines(run_dir)
    for whole, split in zip(lines["whole"], lines["split"], strict=True):
        for name in ("loss", "itc", "inter", "itm", "intra", "entropy", "grad_norm", "logit_scale"):
            assert split[name] == pytest.approx(whole[name], rel=1e-5, abs=1e-5), (whole["step"], name)
