"""The command line of the evaluation."""

import sys
from pathlib import Path

import pytest

from eclip.evaluate import __main__ as command


def test_help_names_every_flag(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate", "--help"])
    with pytest.raises(SystemExit) as stop:
        command.main()
    assert not stop.value.code
    text = capsys.readouterr().out
    for flag in ("--checkpoint", "--split", "--device", "--batch-size", "--limit", "--threshold", "--cache-dir"):
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
