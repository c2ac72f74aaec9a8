"""A run whose ranks are killed again and again, or that is told to stop, ends with the weights of an unbroken one."""

import os
import random
import re
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from eclip.training.checkpoint import load_run
from tests.processes import Processes
from tests.training.run_folders import metrics_lines
from tests.twelve_products import write_twelve_products

STEPS = 40
# One thread: several add up in an order that differs from run to run.
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_twelve_products(tmp_path_factory.mktemp("twelve"))


def _flags(data_dir: Path, run_dir: Path, *more: str) -> list[str]:
    folders = ["--data-dir", str(data_dir), "--run-dir", str(run_dir)]
    often = ["--log-every", "1", "--checkpoint-every", "4", "--no-evaluate"]
    return ["-m", "eclip.train", "--preset", "debug", *folders, "--steps", str(STEPS), *often, *more]


def _attempt(output: str) -> tuple[int, int]:
    """Which attempt of the launcher this is, and the steps it has logged."""
    return len(re.findall(r"(?m)^preset debug", output)), len(
        re.findall(r"(?m)^step \d+/", output.rpartition("preset debug")[2])
    )


def _kill_three_times(processes: Processes, flags: list[str], seed: int) -> None:
    moments = random.Random(seed)
    torchrun = processes.start_torchrun(*flags, options=["--max-restarts=3"])
    for attempt in (1, 2, 3):
        rank, steps = moments.randrange(2), moments.randrange(1, 11)
        while _attempt(processes.output) < (attempt, steps):
            assert torchrun.poll() is None and processes.seconds_left > 0, processes.output
            time.sleep(0.01)
        (pid,) = [pid for pid, of in processes.children(torchrun).items() if of == rank]
        os.kill(pid, signal.SIGKILL)
    assert processes.wait(torchrun) == 0, processes.output
    assert _attempt(processes.output)[0] == 4
    assert "Traceback" not in processes.output


def _assert_same_ends(one: Path, two: Path) -> None:
    """Weights, their moving average and every logged loss, to the bit."""
    for weights in ("model", "momentum"):
        mine, other = (load_run(run_dir, weights=weights)[0].state_dict() for run_dir in (one, two))
        assert all(torch.equal(mine[name], other[name]) for name in mine)
    lines = [[(line["step"], line["loss"]) for line in metrics_lines(run_dir)] for run_dir in (one, two)]
    assert lines[0] == lines[1]
    assert [step for step, _ in lines[0]] == list(range(1, STEPS + 1))


def test_two_ranks_killed_three_times_at_random(data_dir: Path, tmp_path: Path) -> None:
    """Also in the middle of a step's parts and of a checkpoint that is written in the background.

    The unbroken run writes them at once. test_restart.py has restarts without either.
    """
    split = ["--micro-batch", "2"]
    with Processes(timeout=300) as processes:
        _kill_three_times(processes, _flags(data_dir, tmp_path / "killed", *split, "--async-checkpoints"), seed=1)
    with Processes(timeout=120) as processes:
        unbroken = processes.start_torchrun(*_flags(data_dir, tmp_path / "unbroken", *split))
        assert processes.wait(unbroken) == 0, processes.output
    _assert_same_ends(tmp_path / "killed", tmp_path / "unbroken")


def test_a_job_that_a_queue_takes_off_goes_on_exactly(data_dir: Path, tmp_path: Path) -> None:
    """SIGUSR1 is what Slurm warns with: a checkpoint, and 128 + 10; the same command with --resume ends the run."""
    flags = _flags(data_dir, tmp_path / "run", "--async-checkpoints")
    with Processes() as processes:
        train = processes.start([sys.executable, *flags], ENVIRONMENT)
        processes.wait_for(r"(?m)^step 6/")
        train.send_signal(signal.SIGUSR1)
        assert processes.wait(train) == 128 + signal.SIGUSR1
        (step,) = re.findall(r"SIGUSR1: checkpoint of step (\d+) written; continue with --resume", processes.output)
        assert 6 <= int(step) < STEPS
        again = processes.start([sys.executable, *flags, "--resume"], ENVIRONMENT)
        assert processes.wait(again) == 0, processes.output
        assert f"resumed at step {step} from" in processes.output
        unbroken = processes.start([sys.executable, *_flags(data_dir, tmp_path / "unbroken")], ENVIRONMENT)
        assert processes.wait(unbroken) == 0, processes.output
    _assert_same_ends(tmp_path / "run", tmp_path / "unbroken")
