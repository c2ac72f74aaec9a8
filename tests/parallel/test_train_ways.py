"""The user's command: a run is the same whichever way two ranks share it, and as one process has it."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from tests.helpers import run_command, run_torchrun
from tests.twelve_products import write_twelve_products

# A tower whose last block learns, checkpointed blocks, and two backward passes a step on two ranks.
FLAGS = ["--preset", "debug", "--steps", "3", "--no-evaluate", "--log-every", "1", "--vision-depth", "2"]
FLAGS += ["--lock-image", "--unlock-last", "1", "--micro-batch", "2", "--activation-checkpointing", "blocks"]


def _losses(run_dir: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_two_ranks_in_every_way_and_one_process(tmp_path: Path) -> None:
    data = write_twelve_products(tmp_path / "data")
    flags = [*FLAGS, "--data-dir", str(data)]
    run_command([sys.executable, "-m", "eclip.train", *flags, "--run-dir", str(tmp_path / "one")])
    expected = _losses(tmp_path / "one")
    assert len(expected) == 3
    for way in ("none", "full"):
        run_torchrun("-m", "eclip.train", *flags, "--run-dir", str(tmp_path / way), "--shard", way)
        assert _losses(tmp_path / way) == pytest.approx(expected, rel=1e-4), way
    # A run goes on in another way.
    shutil.copytree(tmp_path / "none", tmp_path / "on")
    for run, way in (("none", "none"), ("on", "full")):
        flags = [*FLAGS, "--data-dir", str(data), "--steps", "4", "--resume", "--run-dir", str(tmp_path / run)]
        run_torchrun("-m", "eclip.train", *flags, "--shard", way)
    assert _losses(tmp_path / "on") == pytest.approx(_losses(tmp_path / "none"), rel=1e-4)
    assert len(_losses(tmp_path / "on")) == 4
