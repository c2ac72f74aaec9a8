"""What the commands share: nobody need listen, a refusal is one line, and each signal has its exit status."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from eclip.dataloading.system.command import one_line_errors
from tests.dataloading.shop import simple, split_keys
from tests.helpers import rank_environment


@pytest.mark.parametrize(
    "streams",
    ["| true", ">&-", ">/dev/full", "2>&1 | true", "2>&-", "2>/dev/full", ">&- 2>&-", "2>&1 >/dev/full | true"],
)
def test_a_packing_ends_well_when_nobody_listens(tmp_path: Path, streams: str) -> None:
    table, out = simple(tmp_path, 3), tmp_path / "out"
    command = f"{sys.executable} -m eclip.dataloading.pack --table {table} --images {tmp_path} --out {out} {streams}"
    script = f"set -o pipefail; {command}"
    environment = {**rank_environment(), "TQDM_DISABLE": "0"}
    run = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0 and "rror" not in run.stderr, run.stderr
    assert split_keys(out)["train"] == {"p0", "p1", "p2"}


@pytest.mark.parametrize(
    "number, status", [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)], ids=["TERM", "HUP", "INT"]
)
def test_signals(number: signal.Signals, status: int, capsys: pytest.CaptureFixture[str]) -> None:
    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)}
    with pytest.raises(SystemExit) as stop, one_line_errors("command"):
        signal.raise_signal(number)
    assert stop.value.code == status
    err = capsys.readouterr().err
    assert err == f"command: stopped ({'Ctrl-C' if number == signal.SIGINT else number.name})\n"
    assert {each: signal.getsignal(each) for each in before} == before


def test_a_hangup_that_is_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with one_line_errors("command"):
            signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("error", [ValueError("two\nlines"), OSError(28, "No space left on device")])
def test_errors_are_one_line(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop, one_line_errors("command"):
        raise error
    err = capsys.readouterr().err
    assert stop.value.code == 1 and err.startswith("command: error: ") and err.count("\n") == 1
