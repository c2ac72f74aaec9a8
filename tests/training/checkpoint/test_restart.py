"""Real ranks that are killed, stopped, told to stop, or stuck: the run goes on or ends, and nothing stays behind."""

import json
import os
import signal
import sys
from pathlib import Path

from tests.processes import Processes, alive
from tests.twelve_products import write_twelve_products


def _flags(tmp_path: Path, *more: str) -> list[str]:
    data = tmp_path / "data"
    if not data.exists():
        write_twelve_products(data)
    folders = ["--data-dir", str(data), "--run-dir", str(tmp_path / "run")]
    return ["--preset", "debug", *folders, "--steps", "100000", "--no-evaluate", *more]


def _steps(tmp_path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]


def _newest(tmp_path: Path) -> str:
    return max(p.name for p in (tmp_path / "run" / "checkpoints").iterdir() if not p.suffix)


def test_torchrun_survives_a_killed_rank_and_stops_when_one_is_told_to(tmp_path: Path) -> None:
    """A fresh run restarted by --max-restarts goes on from its own checkpoint, though its flags would refuse one."""
    flags = _flags(tmp_path, "--checkpoint-every", "5", "--log-every", "1")
    with Processes() as processes:
        torchrun = processes.start_torchrun("-m", "eclip.train", *flags, options=["--max-restarts=2"])
        processes.wait_for(r"(?m)^step 7/")
        ranks = {rank: pid for pid, rank in processes.children(torchrun).items() if rank >= 0}
        os.kill(ranks[1], signal.SIGKILL)

        processes.wait_for(r"resumed at step \d+")
        processes.wait_for(r"(?s)resumed at step.*\nstep \d+/.*\nstep \d+/")
        assert f"error: rank 1 (process {ranks[1]} on " in processes.output
        again = {rank: pid for pid, rank in processes.children(torchrun).items() if rank >= 0}
        os.kill(again[1], signal.SIGTERM)
        assert processes.wait(torchrun) == 0
        assert "continue with --resume (exit status 0, so that torchrun does not start it again)" in processes.output
        assert processes.output.count("resumed at step") == 1
        assert "Traceback" not in processes.output
        assert not alive([*ranks.values(), *again.values()])
    steps = _steps(tmp_path)
    assert steps == list(range(1, len(steps) + 1))
    assert _newest(tmp_path) == f"step_{steps[-1]:08d}"


STUCK = """
import itertools, sys, threading
import eclip.train
import eclip.training.trainer

make = eclip.training.trainer.make_loader

class Stuck:
    def __init__(self, loader):
        self.loader, self.state_dict = loader, loader.state_dict

    def __iter__(self):
        yield from itertools.islice(self.loader, 3)
        print("no data any more", flush=True)
        threading.Event().wait()

eclip.training.trainer.make_loader = lambda prepared, ranks: (Stuck if ranks.rank == 1 else lambda x: x)(
    make(prepared, ranks)
)
eclip.train.leave(eclip.train.main(sys.argv[1:]))
"""


def test_a_rank_without_data_stops_with_the_others(tmp_path: Path) -> None:
    """Rank 0 has its batch and waits for rank 1, which waits for data; SIGTERM to rank 0 alone saves the steps done."""
    with Processes() as processes:
        ranks = processes.start_ranks([sys.executable, "-c", STUCK, *_flags(tmp_path, "--checkpoint-every", "100")])
        processes.wait_for("no data any more")
        ranks[0].send_signal(signal.SIGTERM)
        assert [processes.wait(rank) for rank in ranks] == [143, 143]
        assert "SIGTERM: checkpoint of step 3 written; continue with --resume" in processes.output
        assert "Traceback" not in processes.output
    assert _newest(tmp_path) == "step_00000003"


STOPPED = """
import os
from eclip.parallel.ending import conclude, leave
from eclip.parallel.ranks import find_ranks, start_ranks
from eclip.parallel.signals import StopSignals

with StopSignals() as stop:
    ranks = start_ranks(find_ranks(timeout=60, stop=stop))
    ranks.watch.timeout = 2  # the time to start is another matter
    print(f"rank {ranks.rank} is {os.getpid()}", flush=True)
    try:
        with stop.noted():
            while True:
                ranks.highest(0)
    except BaseException as error:
        leave(conclude(error, ranks.watch, stop, told=(), stopped="stopped"))
"""


def test_a_stopped_rank_is_named(tmp_path: Path) -> None:
    with Processes() as processes:
        ranks = processes.start_ranks([sys.executable, "-c", STOPPED])
        processes.wait_for(r"rank \d is", times=2)
        ranks[1].send_signal(signal.SIGSTOP)
        assert processes.wait(ranks[0]) == 1
        lost = [line for line in processes.output.splitlines() if line.startswith("error: ")]
        assert len(lost) == 1, processes.output
        assert f"rank 1 (process {ranks[1].pid} on " in lost[0]
        assert "Traceback" not in processes.output


def test_an_error_of_all_ranks_is_the_last_line_of_torchrun(tmp_path: Path) -> None:
    """Once on the way, once at the end of torchrun's own summary, before anything is packed or built."""
    with Processes() as processes:
        flags = _flags(tmp_path, "--kernels", "reference")
        torchrun = processes.start_torchrun("-m", "eclip.train", *flags)
        assert processes.wait(torchrun) == 1
        line = "error: --kernels reference compares on one rank, these are 2"
        lines = processes.output.strip().splitlines()
        assert len([text for text in lines if text.startswith(line)]) == 1
        assert lines[-2].strip().startswith(f"traceback : {line}")
        assert "eclip/train" not in processes.output  # no frame of ours
    assert not (tmp_path / "run").exists()
