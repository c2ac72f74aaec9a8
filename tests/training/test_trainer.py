"""The loop on a handful of tiny images: resume, SIGTERM, ranks, and what stops a run. Everything to the bit."""

import json
import resource
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from eclip.config import RunConfig
from eclip.files import CannotWrite
from eclip.objectives.eclip import EclipObjective
from eclip.presets import PRESETS
from eclip.train import NonFiniteLoss, train
from eclip.training.checkpoint import load_run
from eclip.training.checkpoint.files import list_checkpoints
from eclip.training.optim import learning_rate
from tests.helpers import run_torchrun
from tests.training.run_folders import ALONE, make_config, metrics_lines

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
LOSSES = ("loss", "itc", "inter", "itm", "intra", "entropy", "grad_norm")


def _config(data_dir: Path, run_dir: Path, **changes: Any) -> RunConfig:
    """20 steps with checkpoints of the tenth and the last."""
    return make_config(data_dir, run_dir, **{"steps": 20, "checkpoint_every": 10, **changes})


@pytest.fixture(scope="module")
def straight(twelve_products: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an unbroken run of 20 steps."""
    run_dir = tmp_path_factory.mktemp("straight")
    assert train(_config(twelve_products, run_dir), ALONE)
    return run_dir


def _assert_same_run(one: Path, two: Path) -> None:
    """Every loss in metrics.jsonl and every weight, to the bit."""
    losses = [[{k: line[k] for k in ("step", *LOSSES)} for line in metrics_lines(run)] for run in (one, two)]
    assert losses[0] == losses[1]
    assert [line["step"] for line in losses[0]] == list(range(1, 21))
    for (name, a), b in zip(*(list(load_run(run)[0].state_dict().items()) for run in (one, two)), strict=True):
        assert name == b[0]
        assert torch.equal(a, b[1]), name


def test_sigterm_checkpoints_and_resume_repeats_the_unbroken_run(
    twelve_products: Path, tmp_path: Path, straight: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop_after_ten(step: int, values: Mapping[str, float]) -> None:
        if step == 10:  # arrives between two steps: the eleventh is not begun
            signal.raise_signal(signal.SIGTERM)

    # checkpoint_every differs on purpose: the checkpoint at step 10 is SIGTERM's own.
    before = signal.getsignal(signal.SIGTERM)
    assert not train(_config(twelve_products, tmp_path, checkpoint_every=1000), ALONE, sinks=[stop_after_ten])
    assert signal.getsignal(signal.SIGTERM) is before
    assert "continue with --resume" in capsys.readouterr().out
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step_00000010"]
    assert train(_config(twelve_products, tmp_path, resume=True), ALONE)
    assert "resumed at step 10" in capsys.readouterr().out
    _assert_same_run(straight, tmp_path)


def test_resume_after_a_kill_drops_the_steps_after_the_checkpoint(
    twelve_products: Path, tmp_path: Path, straight: Path
) -> None:
    run_dir = tmp_path / "copy"
    shutil.copytree(straight, run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "step_00000020")  # as if killed while writing it
    assert train(_config(twelve_products, run_dir, resume=True), ALONE)
    _assert_same_run(straight, run_dir)


def test_two_ranks_give_the_losses_of_one(twelve_products: Path, tmp_path: Path) -> None:
    """FSDP2 over gloo, with decoder blocks that share the tokens' gradient; then one process resumes the two's run."""
    alone, two = tmp_path / "alone", tmp_path / "two"
    assert train(_config(twelve_products, alone, steps=8, decoder_depth=3), ALONE)
    flags = ["--preset", "debug", "--steps", "8", "--data-dir", str(twelve_products), "--run-dir", str(two)]
    flags += ["--checkpoint-every", "4", "--no-evaluate", "--decoder-depth", "3"]
    output = run_torchrun("-m", "eclip.train", *flags, timeout=240)
    assert "on 2 x CPU" in output
    assert "terminate called" not in output

    def assert_same_losses() -> None:
        for expected, found in zip(metrics_lines(alone), metrics_lines(two), strict=True):
            for name in LOSSES:
                assert found[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-5), (expected["step"], name)

    assert_same_losses()
    shutil.rmtree(two / "checkpoints" / "step_00000008")
    assert train(_config(twelve_products, two, steps=8, decoder_depth=3, resume=True), ALONE)
    assert_same_losses()


def _poison(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """Let the losses of some steps be NaN."""
    losses_of = EclipObjective.losses

    def poisoned(*args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        losses = losses_of(*args, **kwargs)
        batch = args[3]
        if batch.step in steps:
            losses["loss"] = losses["loss"] * float("nan")
        return losses

    monkeypatch.setattr(EclipObjective, "losses", poisoned)


def test_too_many_steps_that_are_not_finite_end_the_run_with_losses_and_keys(
    twelve_products: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _poison(monkeypatch, 2, 3, 4)
    with pytest.raises(NonFiniteLoss, match=r"step 4: itc [\d.]+.*loss nan.*p\d+/00\d.jpg") as error:
        train(_config(twelve_products, tmp_path, max_nonfinite_steps=2), ALONE)
    assert "16 in" in str(error.value)
    report = json.loads((tmp_path / "nonfinite_step2_rank0.json").read_text())
    assert report["step"] == 2
    assert len(report["keys"]) == 16
    assert [line["step"] for line in metrics_lines(tmp_path)] == [1, 2, 3, 4]
    assert [line.get("skipped_steps", 0) for line in metrics_lines(tmp_path)] == [0, 0, 1, 2]
    assert "loss" not in metrics_lines(tmp_path)[2]


def test_a_step_that_is_not_finite_changes_nothing(
    twelve_products: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither weights nor moments nor the momentum model: those of the checkpoints before and after it are equal."""
    _poison(monkeypatch, 2)
    assert train(_config(twelve_products, tmp_path, steps=4, checkpoint_every=1, keep_checkpoints=9), ALONE)
    before, after, later = (_tensors(tmp_path / "checkpoints" / f"step_0000000{n}") for n in (2, 3, 4))
    assert any(name.startswith("momentum.") for name in before)
    assert any(name.endswith("exp_avg") for name in before)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not torch.equal(after["model.logit_scale"], later["model.logit_scale"])


def test_skipped_steps_are_counted_across_a_resume(
    twelve_products: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 1, 3 and 4 are skipped; the checkpoint stands between them. Lines and weights are the unbroken run's."""
    _poison(monkeypatch, 1, 3, 4)
    changes = {"steps": 6, "checkpoint_every": 2, "keep_checkpoints": 9}
    runs = [tmp_path / "straight", tmp_path / "broken"]
    for run in runs:
        assert train(_config(twelve_products, run, **changes), ALONE)
    for later in (4, 6):
        shutil.rmtree(runs[1] / "checkpoints" / f"step_0000000{later}")
    assert train(_config(twelve_products, runs[1], resume=True, **changes), ALONE)
    lines = [[{k: line.get(k) for k in ("step", "skipped_steps", *LOSSES)} for line in metrics_lines(r)] for r in runs]
    assert lines[0] == lines[1]
    assert [line["skipped_steps"] for line in lines[1]] == [None, 1, 1, 2, 3, 3]
    ends = [_tensors(run / "checkpoints" / "step_00000006") for run in runs]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def _tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All that a checkpoint holds."""
    metadata = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    tensors = {key: torch.empty(entry.size) for key, entry in metadata.items()}
    dcp.load(tensors, checkpoint_id=checkpoint, no_dist=True)
    return tensors


def test_a_full_disk_stops_the_run_in_one_line_and_resume_repeats_the_unbroken_one(
    twelve_products: Path, tmp_path: Path, straight: Path
) -> None:
    """The checkpoint of step 20 finds no room: that of step 10 stays, and every line of metrics.jsonl."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_the_disk(step: int, values: Mapping[str, float]) -> None:
        if step == 12:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))

    try:
        with pytest.raises(CannotWrite, match=r"step_00000020\.partial: cannot be written \(File too large"):
            train(_config(twelve_products, tmp_path), ALONE, sinks=[fill_the_disk])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_00000010"]
    assert [line["step"] for line in metrics_lines(tmp_path)] == list(range(1, 21))
    assert train(_config(twelve_products, tmp_path, resume=True), ALONE)
    _assert_same_run(straight, tmp_path)


def test_the_scale_is_in_the_metrics(straight: Path) -> None:
    lines = metrics_lines(straight)
    assert lines[0]["logit_scale"] == pytest.approx(1 / 0.07)
    assert all(1 <= line["logit_scale"] <= 100 for line in lines)


def test_a_growing_batch_is_resumed_in_its_middle_by_other_ranks_and_parts(
    twelve_products: Path, tmp_path: Path
) -> None:
    """Sizes 4, 8 and 12 by one process; again, from step 4 on, by two ranks that take 2 products at a time."""
    alone, two = tmp_path / "alone", tmp_path / "two"
    schedule = {"batch_schedule": "0:4,3:8,6:12", "steps": 9, "checkpoint_every": 4, "keep_checkpoints": 9}
    assert train(_config(twelve_products, alone, lr_scaling="linear", **schedule), ALONE)
    shutil.copytree(alone, two)
    for later in ("step_00000008", "step_00000009"):
        shutil.rmtree(two / "checkpoints" / later)
    flags = ["--preset", "debug", "--steps", "9", "--data-dir", str(twelve_products), "--run-dir", str(two)]
    flags += ["--batch-schedule", "0:4,3:8,6:12", "--lr-scaling", "linear", "--micro-batch", "2", "--resume"]
    run_torchrun("-m", "eclip.train", *flags, "--no-evaluate", timeout=240)
    for expected, found in zip(metrics_lines(alone), metrics_lines(two), strict=True):
        assert found["learning_rate"] == expected["learning_rate"]
        for name in LOSSES:
            assert found[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-5), (expected["step"], name)
    rates = [line["learning_rate"] for line in metrics_lines(alone)]
    unscaled = PRESETS["debug"].optim
    shares = [rates[s] / learning_rate(s, 9, unscaled) for s in range(8)]
    assert shares == pytest.approx([1 / 3] * 3 + [2 / 3] * 3 + [1.0] * 2)
