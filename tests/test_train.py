"""Training end to end on a handful of tiny images: resume, SIGTERM, ranks, and what stops a run."""

import dataclasses
import json
import re
import resource
import shutil
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import eclip.train
import eclip.training.build
import eclip.training.prepare
import eclip.training.step
from eclip.config import RunConfig
from eclip.files import CannotWrite
from eclip.parallel.ranks import Ranks
from eclip.presets import PRESETS
from eclip.train import CannotStart, NonFiniteLoss, main, train
from eclip.training.checkpoint import load_run
from eclip.training.checkpoint_files import list_checkpoints
from tests.helpers import run_command, run_torchrun
from tests.twelve_products import write_twelve_products

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
ALONE = Ranks(rank=0, world_size=1, device=torch.device("cpu"), mesh=None)
LOSSES = ("loss", "itc", "inter", "itm", "intra", "entropy", "grad_norm")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve products of noise in shards."""
    return write_twelve_products(tmp_path_factory.mktemp("shards"))


def _config(data_dir: Path, run_dir: Path, **changes: Any) -> RunConfig:
    base = PRESETS["debug"]
    data = dataclasses.replace(base.data, data_dir=data_dir)
    defaults = {"steps": 20, "checkpoint_every": 10, "overwrite": False, "evaluate": False}
    return dataclasses.replace(base, run_dir=run_dir, data=data, **{**defaults, **changes})


def _lines(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def straight(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an unbroken run of 20 steps."""
    run_dir = tmp_path_factory.mktemp("straight")
    assert train(_config(data_dir, run_dir), ALONE)
    return run_dir


def _assert_same_run(one: Path, two: Path) -> None:
    """Every loss in metrics.jsonl and every weight, to the bit."""
    losses = [[{k: line[k] for k in ("step", *LOSSES)} for line in _lines(run)] for run in (one, two)]
    assert losses[0] == losses[1]
    assert [line["step"] for line in losses[0]] == list(range(1, 21))
    for (name, a), b in zip(*(list(load_run(run)[0].state_dict().items()) for run in (one, two)), strict=True):
        assert name == b[0]
        assert torch.equal(a, b[1]), name


def test_sigterm_checkpoints_and_resume_repeats_the_unbroken_run(
    data_dir: Path, tmp_path: Path, straight: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop_after_ten(step: int, values: Mapping[str, float]) -> None:
        if step == 10:  # arrives between two steps: the eleventh is not begun
            signal.raise_signal(signal.SIGTERM)

    # checkpoint_every differs on purpose: the checkpoint at step 10 is SIGTERM's own.
    before = signal.getsignal(signal.SIGTERM)
    assert not train(_config(data_dir, tmp_path, checkpoint_every=1000), ALONE, sinks=[stop_after_ten])
    assert signal.getsignal(signal.SIGTERM) is before
    assert "continue with --resume" in capsys.readouterr().out
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step_00000010"]
    assert train(_config(data_dir, tmp_path, resume=True), ALONE)
    assert "resumed at step 10" in capsys.readouterr().out
    _assert_same_run(straight, tmp_path)


def test_resume_after_a_kill_drops_the_steps_after_the_checkpoint(
    data_dir: Path, tmp_path: Path, straight: Path
) -> None:
    run_dir = tmp_path / "copy"
    shutil.copytree(straight, run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "step_00000020")  # as if killed while writing it
    assert train(_config(data_dir, run_dir, resume=True), ALONE)
    _assert_same_run(straight, run_dir)


def test_two_ranks_give_the_losses_of_one(data_dir: Path, tmp_path: Path) -> None:
    """FSDP2 over gloo, with decoder blocks that share the tokens' gradient; then one process resumes the two's run."""
    alone, two = tmp_path / "alone", tmp_path / "two"
    model = dataclasses.replace(PRESETS["debug"].model, decoder_depth=3)
    assert train(_config(data_dir, alone, steps=8, model=model), ALONE)
    flags = ["--preset", "debug", "--steps", "8", "--data-dir", str(data_dir), "--run-dir", str(two)]
    flags += ["--checkpoint-every", "4", "--no-evaluate", "--decoder-depth", "3"]
    output = run_torchrun("-m", "eclip.train", *flags, timeout=240)
    assert "on 2 x CPU" in output
    assert "terminate called" not in output

    def assert_same_losses() -> None:
        for expected, found in zip(_lines(alone), _lines(two), strict=True):
            for name in LOSSES:
                assert found[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-5), (expected["step"], name)

    assert_same_losses()
    shutil.rmtree(two / "checkpoints" / "step_00000008")
    assert train(_config(data_dir, two, steps=8, model=model, resume=True), ALONE)
    assert_same_losses()


def test_command_line(data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Plain python; then a used folder is refused in one line."""
    flags = ["--preset", "debug", "--steps", "2", "--objective", "clip", "--no-evaluate", "--no-overwrite"]
    flags += ["--data-dir", str(data_dir), "--run-dir", str(tmp_path)]
    output = run_command([sys.executable, "-m", "eclip.train", *flags])
    assert "step 2/2 | loss " in output
    assert {"itc"} == set(_lines(tmp_path)[-1]) & set(LOSSES[1:6])
    assert main(flags) == 1
    assert re.fullmatch("error: .* continue it with --resume.*\\n", capsys.readouterr().err)


def test_locked_towers_stay_and_clip_leaves_the_decoder(data_dir: Path, tmp_path: Path) -> None:
    config = _config(data_dir, tmp_path, steps=2, lock_image=True)
    config = dataclasses.replace(config, objective=dataclasses.replace(config.objective, objective="clip"))
    assert train(config, ALONE)
    trained, saved, tokenizer = load_run(tmp_path)
    assert saved.model.vocab_size == tokenizer.vocab_size
    start = eclip.training.build.build_model(saved)
    changed = {n.split(".")[0] for n, p in trained.named_parameters() if not torch.equal(p, start.get_parameter(n))}
    assert changed == {"text_encoder", "image_projection", "text_projection", "logit_scale"}


def test_cached_features(data_dir: Path, tmp_path: Path) -> None:
    config = _config(data_dir, tmp_path / "run", steps=2, lock_image=True, lock_text=True, cache_features=True)
    assert train(config, ALONE)
    assert len(list((data_dir / "features").glob("*.npy"))) == 2
    assert train(dataclasses.replace(config, run_dir=tmp_path / "again"), ALONE)
    assert [line["loss"] for line in _lines(tmp_path / "run")] == [line["loss"] for line in _lines(tmp_path / "again")]


def test_non_finite_loss_stops_with_step_losses_and_keys(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = eclip.training.step.compute_losses

    def poisoned(*args: Any, step: int, **kwargs: Any) -> dict[str, torch.Tensor]:
        losses = compute(*args, step=step, **kwargs)
        if step == 2:
            losses["loss"] = losses["loss"] * float("nan")
        return losses

    monkeypatch.setattr(eclip.training.step, "compute_losses", poisoned)
    with pytest.raises(NonFiniteLoss, match=r"step 2: itc [\d.]+.*loss nan.*p\d+/00\d.jpg") as error:
        train(_config(data_dir, tmp_path), ALONE)
    assert "16 in" in str(error.value)
    report = json.loads((tmp_path / "nonfinite_step2_rank0.json").read_text())
    assert report["step"] == 2
    assert len(report["keys"]) == 16
    assert len(_lines(tmp_path)) == 2


def test_a_full_disk_stops_the_run_in_one_line_and_resume_repeats_the_unbroken_one(
    data_dir: Path, tmp_path: Path, straight: Path
) -> None:
    """The checkpoint of step 20 finds no room: that of step 10 stays, and every line of metrics.jsonl."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_the_disk(step: int, values: Mapping[str, float]) -> None:
        if step == 12:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))

    try:
        with pytest.raises(CannotWrite, match=r"step_00000020\.partial: cannot be written \(File too large"):
            train(_config(data_dir, tmp_path), ALONE, sinks=[fill_the_disk])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_00000010"]
    assert [line["step"] for line in _lines(tmp_path)] == list(range(1, 21))
    assert train(_config(data_dir, tmp_path, resume=True), ALONE)
    _assert_same_run(straight, tmp_path)


def test_the_scale_is_in_the_metrics(straight: Path) -> None:
    lines = _lines(straight)
    assert lines[0]["logit_scale"] == pytest.approx(1 / 0.07)
    assert all(1 <= line["logit_scale"] <= 100 for line in lines)


def test_refusals_before_training(data_dir: Path, tmp_path: Path, straight: Path) -> None:
    fresh = tmp_path / "run"
    with pytest.raises(CannotStart, match="no such file"):
        train(_config(data_dir, fresh, vocab_file=tmp_path / "vocab.txt"), ALONE)
    with pytest.raises(CannotStart, match="train-000000.tar"):
        train(_config(tmp_path / "nothing", fresh), ALONE)
    with pytest.raises(CannotStart, match="test-000000.tar.*--no-evaluate"):
        train(_config(data_dir, fresh, evaluate=True), ALONE)
    with pytest.raises(CannotStart, match="does not divide over 3 ranks"):
        train(_config(data_dir, fresh), dataclasses.replace(ALONE, world_size=3))
    with pytest.raises(CannotStart, match="at least 4"):
        train(_config(data_dir, fresh, global_batch_size=2), ALONE)
    with pytest.raises(CannotStart, match="--overwrite"):
        train(_config(data_dir, straight), ALONE)
    with pytest.raises(CannotStart, match="another seed"):
        train(_config(data_dir, straight, resume=True, seed=1), ALONE)
    wider = dataclasses.replace(PRESETS["debug"].model, decoder_depth=2)
    with pytest.raises(CannotStart, match=r"another decoder_depth .the run has 1, the flags give 2"):
        train(_config(data_dir, straight, resume=True, model=wider), ALONE)


def test_overwrite_replaces_and_resume_may_start(data_dir: Path, tmp_path: Path) -> None:
    config = _config(data_dir, tmp_path, steps=1)
    assert train(dataclasses.replace(config, resume=True), ALONE)  # nothing there yet
    assert train(dataclasses.replace(config, resume=True), ALONE)  # all done
    assert len(_lines(tmp_path)) == 1
    assert train(dataclasses.replace(config, overwrite=True, seed=3), ALONE)
    assert len(_lines(tmp_path)) == 1


def test_only_a_demo_presets_own_folder_is_packed(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed: list[Path] = []
    monkeypatch.setattr(eclip.training.prepare, "pack_demo", lambda folder, **settings: packed.append(folder))
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    shutil.copytree(data_dir, "data/debug")
    assert train(_config(Path("data/debug"), tmp_path / "a", steps=1), ALONE)
    assert train(_config(data_dir, tmp_path / "b", steps=1), ALONE)
    assert packed == [Path("data/debug")]


def test_main_evaluates_at_the_end(data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import eclip.evaluate.run

    shards = tmp_path / "shards"
    shutil.copytree(data_dir, shards)
    shutil.copy(shards / "train-000000.tar", shards / "test-000000.tar")
    evaluated: list[Path] = []
    monkeypatch.setattr(eclip.evaluate.run, "evaluate_run", lambda run_dir, device, **k: evaluated.append(run_dir))
    flags = ["--preset", "debug", "--steps", "1", "--data-dir", str(shards), "--run-dir", str(tmp_path / "run")]
    assert main(flags) == 0
    assert evaluated == [tmp_path / "run"]
    assert main([*flags, "--no-evaluate", "--num-queries", "9"]) == 1
    assert len(evaluated) == 1


def test_a_loader_stalls_before_the_other_ranks_give_up(data_dir: Path, tmp_path: Path) -> None:
    config = _config(data_dir, tmp_path, rank_timeout_seconds=20)
    assert eclip.training.build.stall_limit(config, world_size=1) == config.data.stall_seconds
    assert eclip.training.build.stall_limit(config, world_size=2) == 10
    patient = dataclasses.replace(config, data=dataclasses.replace(config.data, stall_seconds=0))
    assert eclip.training.build.stall_limit(patient, world_size=2) == 0


def test_a_signal_during_evaluation_says_what_is_done(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import eclip.evaluate.run

    shards = tmp_path / "shards"
    shutil.copytree(data_dir, shards)
    shutil.copy(shards / "train-000000.tar", shards / "test-000000.tar")
    monkeypatch.setattr(eclip.evaluate.run, "evaluate_run", lambda *a, **k: signal.raise_signal(signal.SIGINT))
    flags = ["--preset", "debug", "--steps", "1", "--data-dir", str(shards), "--run-dir", str(tmp_path / "run")]
    assert main(flags) == 130
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("SIGINT: the run is complete, its evaluation is not; repeat that with python -m eclip.eval")


def test_a_signal_before_the_first_step(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(eclip.train, "prepare", lambda *a, **k: signal.raise_signal(signal.SIGTERM))
    flags = ["--preset", "debug", "--data-dir", str(data_dir), "--run-dir", str(tmp_path / "run")]
    assert main(flags) == 143
    assert capsys.readouterr() == ("SIGTERM: stopped before the first step, nothing to save\n", "")
    assert not (tmp_path / "run").exists()
