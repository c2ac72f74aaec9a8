"""The user's command: what it refuses, what it prints and returns, and that it evaluates at the end."""

import dataclasses
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest

import eclip.train
from eclip.train import CannotStart, main, train
from tests.helpers import run_command
from tests.training.run_folders import ALONE, make_config, metrics_lines
from tests.twelve_products import write_twelve_products

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve products of noise in shards."""
    return write_twelve_products(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def finished(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two steps."""
    run_dir = tmp_path_factory.mktemp("finished")
    assert train(make_config(data_dir, run_dir), ALONE)
    return run_dir


def test_command_line(data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Plain python; then a used folder is refused in one line."""
    flags = ["--preset", "debug", "--steps", "2", "--objective", "clip", "--no-evaluate", "--no-overwrite"]
    flags += ["--data-dir", str(data_dir), "--run-dir", str(tmp_path)]
    output = run_command([sys.executable, "-m", "eclip.train", *flags])
    assert "step 2/2 | loss " in output
    assert {"itc"} == set(metrics_lines(tmp_path)[-1]) & {"itc", "inter", "itm", "intra", "entropy"}
    assert main(flags) == 1
    assert re.fullmatch("error: .* continue it with --resume.*\\n", capsys.readouterr().err)


def test_refusals_before_training(data_dir: Path, tmp_path: Path, finished: Path) -> None:
    fresh = tmp_path / "run"
    with pytest.raises(CannotStart, match="no such file"):
        train(make_config(data_dir, fresh, vocab_file=tmp_path / "vocab.txt"), ALONE)
    with pytest.raises(CannotStart, match="train-000000.tar"):
        train(make_config(tmp_path / "nothing", fresh), ALONE)
    with pytest.raises(CannotStart, match="test-000000.tar.*--no-evaluate"):
        train(make_config(data_dir, fresh, evaluate=True), ALONE)
    with pytest.raises(CannotStart, match="does not divide over 3 ranks"):
        train(make_config(data_dir, fresh), dataclasses.replace(ALONE, world_size=3))
    with pytest.raises(CannotStart, match="at least 4"):
        train(make_config(data_dir, fresh, global_batch_size=2), ALONE)
    with pytest.raises(CannotStart, match="--overwrite"):
        train(make_config(data_dir, finished), ALONE)
    with pytest.raises(CannotStart, match="another seed"):
        train(make_config(data_dir, finished, resume=True, seed=1), ALONE)
    with pytest.raises(CannotStart, match=r"another decoder_depth .the run has 1, the flags give 2"):
        train(make_config(data_dir, finished, resume=True, decoder_depth=2), ALONE)


def test_overwrite_replaces_and_resume_may_start(data_dir: Path, tmp_path: Path) -> None:
    config = make_config(data_dir, tmp_path, steps=1)
    assert train(dataclasses.replace(config, resume=True), ALONE)  # nothing there yet
    assert train(dataclasses.replace(config, resume=True), ALONE)  # all done
    assert len(metrics_lines(tmp_path)) == 1
    assert train(dataclasses.replace(config, overwrite=True, seed=3), ALONE)
    assert len(metrics_lines(tmp_path)) == 1


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
