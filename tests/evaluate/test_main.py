"""The command line of the evaluation, on a run that was trained for it."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import eclip.evaluate.evaluator as evaluator_module
import eclip.evaluate.run as run_module
from eclip.evaluate import __main__ as command
from eclip.parallel.ranks import Ranks
from eclip.presets import PRESETS
from eclip.train import train
from tests.dataloading.fixtures import jpeg, make_split
from tests.helpers import ROOT, rank_environment

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


def test_help_names_every_flag(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate", "--help"])
    with pytest.raises(SystemExit) as stop:
        command.main()
    assert not stop.value.code
    text = capsys.readouterr().out
    for flag in (
        "--checkpoint",
        "--data-dir",
        "--split",
        "--device",
        "--batch-size",
        "--limit",
        "--threshold",
        "--cache-dir",
    ):
        assert flag in text


def test_flags_reach_the_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}
    monkeypatch.setattr(command, "evaluate_run", lambda run, device, **rest: seen.update(rest, run=run, device=device))
    line = ["evaluate", "--checkpoint", "runs/x", "--device", "cpu", "--threshold", "0.3", "--limit", "4", "--quiet"]
    monkeypatch.setattr(sys, "argv", line)
    command.main()
    assert seen["run"] == Path("runs/x") and seen["device"] == "cpu" and seen["threshold"] == 0.3
    assert seen["limit"] == 4 and seen["split"] == "test" and seen["progress"] is False


def test_missing_run_exits_with_a_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate", "--checkpoint", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match=r"error: .*none: no run here"):
        command.main()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one step with locked, cached towers; its catalogue lies beside it."""
    folder = tmp_path_factory.mktemp("evaluated")
    for split in ("train", "val", "test"):
        make_split(folder / "shop", split, products=6, images=3, tars=1)
    base = PRESETS["debug"]
    config = dataclasses.replace(
        base, run_dir=folder / "run", data=dataclasses.replace(base.data, data_dir=folder / "shop"), steps=1,
        evaluate=False, lock_image=True, lock_text=True, cache_features=True, global_batch_size=6,
    )  # fmt: skip
    assert train(config, Ranks(rank=0, world_size=1, device=torch.device("cpu"), mesh=None))
    return folder / "run"


def evaluate(monkeypatch: pytest.MonkeyPatch, *flags: object) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate", "--quiet", "--device", "cpu", *map(str, flags)])
    command.main()


def test_a_run_is_evaluated_on_its_own_catalogue_from_anywhere(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_split(tmp_path / "shop", "test", products=2, images=3, tars=1)  # of the same name, where we stand
    monkeypatch.chdir(tmp_path)
    evaluate(monkeypatch, "--checkpoint", run)
    record = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    assert record["data"]["data_dir"] == str(run.parent / "shop") and record["data"]["notes"] == []
    assert record["products"] == 6
    assert capsys.readouterr().out.endswith(f"written: {run / 'evaluation.json'}\n")


def test_another_catalogue_is_evaluated_by_a_flag_and_noted(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("val", "test"):
        make_split(tmp_path, split, products=3, images=3, tars=1, image=lambda p, i: jpeg(p + i, width=60))
    evaluate(monkeypatch, "--checkpoint", run, "--data-dir", tmp_path, "--split", "val")
    note = f"--data-dir {tmp_path}: its val split is not the one of the run"
    assert f"note: {note}" in capsys.readouterr().out
    assert json.loads((run / "evaluation-val.json").read_text(encoding="utf-8"))["data"]["notes"] == [note]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--device", "tpu"), "--device tpu: no such device"),
        (("--device", "cuda:99"), "--device cuda:99: "),
        (("--batch-size", "0"), "--batch-size 0: "),
        (("--limit", "0"), "--limit 0: "),
        (("--threshold", "nan"), "--threshold nan: "),
        (("--split", "nope"), "--split nope: "),
        (("--data-dir", "nowhere"), "nowhere: no such folder; "),
        (("--checkpoint", "."), ".: no run here"),
        (("--cache-dir", "/dev/null/x"), "cannot be used (Not a directory)"),
    ],
)
def test_what_cannot_be_evaluated_is_one_line(
    run: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, str], message: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        evaluate(monkeypatch, "--checkpoint", run, *flags)
    assert isinstance(stop.value.code, str)
    assert stop.value.code.startswith("error: ") and message in stop.value.code and "\n" not in stop.value.code


def test_ctrl_c_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stop(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "evaluate_run", stop)
    with pytest.raises(SystemExit) as ended:
        evaluate(monkeypatch, "--checkpoint", "run")
    said = capsys.readouterr().err
    assert ended.value.code == 130 and said.startswith("error: stopped (Ctrl-C)") and said.count("\n") == 1


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_cut_tar_is_no_heap_of_corrupt_images(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    shop = tmp_path / "shop"
    shutil.copytree(run.parent / "shop", shop, ignore=lambda *_: ["features"])
    tar = shop / "test-000000.tar"

    def cut() -> None:
        with tar.open("r+b") as file:
            file.truncate(tar.stat().st_size // 2)

    if when == "before":
        cut()
    else:
        rows = evaluator_module.choose_rows
        monkeypatch.setattr(evaluator_module, "choose_rows", lambda index, limit: (rows(index, limit), cut())[0])
    written = {path: path.stat().st_mtime_ns for path in run.glob("evaluation*")}
    with pytest.raises(SystemExit, match=rf"^error: .*{re.escape(str(tar))}: .*truncated") as stop:
        evaluate(monkeypatch, "--checkpoint", run, "--data-dir", shop)
    assert "\n" not in str(stop.value.code)
    assert {path: path.stat().st_mtime_ns for path in run.glob("evaluation*")} == written


@pytest.mark.parametrize("flags", [("--batch-size", "many"), ("--nope", "3"), ("--threshold", "high")])
def test_flags_that_cannot_be_read_are_one_line(
    run: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        evaluate(monkeypatch, "--checkpoint", run, *flags)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("error: ") and flags[0] in said and said.count("\n") == 1


@pytest.mark.parametrize("part", ["image_encoder", "text_encoder", "instance_decoder"])
def test_a_checkpoint_of_nan_is_one_line_and_no_table(
    run: Path, monkeypatch: pytest.MonkeyPatch, part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model, config, tokenizer = run_module.load_run(run, "cpu")
    with torch.no_grad():
        for parameter in model.get_submodule(part).parameters():
            parameter.fill_(float("nan"))
    monkeypatch.setattr(run_module, "load_run", lambda run_dir, device, **which: (model, config, tokenizer))
    capsys.readouterr()
    with pytest.raises(SystemExit, match="error: .*NaN or infin") as stop:
        evaluate(monkeypatch, "--checkpoint", run)
    assert "\n" not in str(stop.value.code)
    assert "retrieval" not in capsys.readouterr().out


def test_a_refusal_of_the_program_is_one_line_and_status_1(run: Path, tmp_path: Path) -> None:
    """As a user sees it: from another folder, in a locale without letters."""
    line = [sys.executable, "-m", "eclip.evaluate", "--checkpoint", str(run), "--split", "größe", "--device", "cpu"]
    environment = rank_environment({"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"})
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: --split gr\\xf6\\xdfe: ") and done.stderr.count("\n") == 1
