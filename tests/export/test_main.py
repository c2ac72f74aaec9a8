"""The command line of the export, as a user types it."""

import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest

from eclip.export import __main__ as command
from tests.helpers import ROOT, rank_environment, run_command


def test_help_names_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        command.main(["--help"])
    assert not stop.value.code
    text = capsys.readouterr().out
    assert all(f"--{field.name.replace('_', '-')}" in text for field in fields(command.Arguments))


def test_flags_reach_the_export(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(command, "export_run", lambda *given: seen.extend(given))
    command.main(["--checkpoint", "runs/x", "--out", "o", "--best", "--no-towers", "--onnx", "--int8", "--limit", "3",
                  "--weights", "momentum", "--licence", "mit", "--quiet"])  # fmt: skip
    run, out, wanted = seen
    assert (run, out) == (Path("runs/x"), Path("o"))
    assert (wanted.which, wanted.weights, wanted.towers, wanted.onnx, wanted.int8) == (
        *("best", "momentum", False),
        *(True, True),
    )
    assert (wanted.limit, wanted.measure, wanted.licence, wanted.progress) == (3, True, "mit", False)


@pytest.mark.parametrize(
    "flags, code, words",
    [
        (["--checkpoint", "gone", "--out", "o"], "error: gone: no such folder; give the --run-dir", "gone"),
        (["--checkpoint", "gone"], 2, "--out"),
        (["--checkpoint", "gone", "--out", "o", "--int9"], 2, "--int9"),
        (["--checkpoint", "gone", "--out", "o", "--limit", "3"], 2, "--limit is of what --int8 costs"),
        (["--checkpoint", "gone", "--out", "o", "--int8", "--no-measure", "--limit", "3"], 2, "--limit is of what"),
        (["--checkpoint", "gone", "--out", "o", "--no-measure"], 2, "--no-measure leaves out"),
    ],
)
def test_mistakes_are_one_line(
    flags: list[str], code: int | str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        command.main(flags)
    if isinstance(code, str):
        assert str(stop.value.code).startswith(code)
    else:
        said = capsys.readouterr().err
        assert stop.value.code == code and words in said and len(said.splitlines()) == 1


def test_a_user_exports_and_the_second_time_is_refused(finished: Path, tmp_path: Path) -> None:
    flags = ["--checkpoint", str(finished), "--out", str(tmp_path / "out")]
    said = run_command([sys.executable, "-m", "eclip.export", *flags, "--no-towers"])
    assert f"written: {tmp_path / 'out'}" in said
    with pytest.raises(SystemExit) as stop:
        command.main(flags)
    assert str(stop.value.code).startswith("error: --out ") and "holds an earlier export" in str(stop.value.code)


def test_a_stopped_export_leaves_nothing(finished: Path, tmp_path: Path) -> None:
    code = (
        "import sys, time, eclip.export.run as run, eclip.export.__main__ as command\n"
        "def slow(*_, **__):\n    print('writing', flush=True)\n    time.sleep(60)\n"
        "run.write_towers = slow\n"
        "command.main(sys.argv[1:])\n"
    )
    line = [sys.executable, "-c", code, "--checkpoint", str(finished), "--out", str(tmp_path / "out")]
    process = subprocess.Popen(line, cwd=ROOT, env=rank_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"writing\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and said.decode().splitlines()[-1].startswith("error: stopped; nothing is left")
    assert not list(tmp_path.iterdir())
