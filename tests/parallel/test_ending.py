"""How a run ends before its end: one line, from one rank, and an exit status."""

import json
import signal
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

import eclip.parallel.ending
import eclip.parallel.watch
from eclip.parallel.ending import conclude, leave, once
from eclip.parallel.rendezvous import Meeting
from eclip.parallel.signals import Stopped, StopSignals
from eclip.parallel.watch import PeerFailed, Watch

GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error [::1]:1: Connection reset by peer"


@pytest.fixture
def watches(monkeypatch: pytest.MonkeyPatch):
    """Of two ranks."""
    monkeypatch.setattr(eclip.parallel.watch, "INTERVAL", 0.02)
    monkeypatch.setattr(eclip.parallel.ending, "_AGREE_SECONDS", 0.3)
    monkeypatch.setattr(eclip.parallel.ending, "_SILENT_SECONDS", 0.3)
    monkeypatch.setattr(eclip.parallel.ending, "_YIELD_SECONDS", 0.0)
    meeting = Meeting(store=dist.HashStore(), members=("process 10 on a", "process 20 on b"))
    found = [Watch(meeting, rank, timeout=60, on_stop=lambda number: None) for rank in range(2)]
    yield found
    for watch in found:
        watch.retire()


def _conclude(error: BaseException, watch: Watch | None, *, signum: int | None = None) -> int:
    stop = StopSignals()
    stop.signum = signum
    return conclude(error, watch, stop, told=(ValueError, OSError), stopped="stopped before the first step")


@pytest.mark.parametrize("error", [ValueError("no\nsuch file"), OSError(28, "No space left on device")])
def test_alone(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    assert _conclude(error, None) == 1
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1
    with pytest.raises(KeyError):  # a bug keeps its traceback
        _conclude(KeyError("a"), None)
    assert _conclude(Stopped(signal.SIGINT), None) == 130
    assert capsys.readouterr().out == "SIGINT: stopped before the first step\n"


def test_ranks_that_fail_alike_speak_once(watches: list[Watch], capsys: pytest.CaptureFixture[str]) -> None:
    assert [_conclude(ValueError("full disk"), watch) for watch in watches] == [1, 1]
    assert capsys.readouterr().err == "error: full disk\n"


@pytest.mark.parametrize("consequence", [PeerFailed("rank 1 failed"), RuntimeError(GLOO), Stopped(signal.SIGTERM)])
def test_what_follows_from_another_ranks_failure_is_quiet(
    consequence: BaseException,
    watches: list[Watch],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert _conclude(OSError(28, "No space left on device"), watches[1]) == 1
    capsys.readouterr()
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    signum = consequence.signum if isinstance(consequence, Stopped) else None
    assert _conclude(consequence, watches[0], signum=signum) == 1
    assert capsys.readouterr() == ("", "")
    assert "left because rank 1 failed" in json.loads((tmp_path / "error.json").read_text())["message"]["message"]


def test_a_killed_rank_is_named(watches: list[Watch], capsys: pytest.CaptureFixture[str]) -> None:
    """torchrun sends SIGTERM to the ranks that are left: that is no request to stop."""
    watches[1].retire()
    assert _conclude(RuntimeError(GLOO), watches[0], signum=signal.SIGTERM) == 1
    line = capsys.readouterr().err
    assert line.startswith("error: rank 1 (process 20 on b) left without a word (killed?)") and line.count("\n") == 1


def test_a_lost_connection_between_living_ranks(watches: list[Watch], capsys: pytest.CaptureFixture[str]) -> None:
    assert _conclude(RuntimeError(GLOO), watches[0]) == 1
    assert "ranks lost each other: [/pytorch" in capsys.readouterr().err


@pytest.mark.parametrize("restarts, status", [(0, 143), (3, 0)])
def test_a_stop_that_all_ranks_know_of(
    restarts: int,
    status: int,
    watches: list[Watch],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", str(restarts))
    monkeypatch.setattr(eclip.parallel.ending, "_AGREE_SECONDS", 30)
    watches[1].request_stop(signal.SIGTERM)
    assert _conclude(Stopped(signal.SIGTERM), watches[1], signum=signal.SIGTERM) == status
    assert _conclude(RuntimeError(GLOO), watches[0], signum=signal.SIGTERM) == status
    out, err = capsys.readouterr()
    assert out.startswith("SIGTERM: stopped before the first step") and out.count("\n") == 1
    assert ("torchrun does not start it again" in out) == (restarts > 0)
    assert err == ""


def test_a_bug_keeps_its_traceback_on_one_rank(watches: list[Watch], capsys: pytest.CaptureFixture[str]) -> None:
    for watch in watches:
        assert _conclude(KeyError("a"), watch) == 1
    assert capsys.readouterr().err.count("KeyError") == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_a_wrong_flag_is_told_by_rank_0(
    rank: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eclip.parallel.ending, "_AGREE_SECONDS", 0)

    def parse() -> None:
        print("error: --stepz: no such flag", file=sys.stderr)
        raise SystemExit(2)

    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as end:
        once(parse)
    assert end.value.code == 2
    assert capsys.readouterr().err == ("error: --stepz: no such flag\n" if rank == 0 else "")
    assert once(lambda: "config") == "config"


def test_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit) as end:
        leave(1)
    assert end.value.code == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as end:
        leave(0)
    assert end.value.code == 0


def test_a_process_that_does_not_know_its_rank(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as end:
        once(lambda: None)
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("error: WORLD_SIZE=2 in the environment without RANK")
