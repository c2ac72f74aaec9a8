"""The numbers and the profile of runs, started as users start them: one process, and two ranks on micro-batches."""

import gzip
import json
from pathlib import Path

import pytest

from eclip.training.metrics.gradients import PARTS
from tests.helpers import run_torchrun
from tests.training.run_folders import metrics_lines

STEPS = 3
COMMON = ("--preset", "debug", "--steps", str(STEPS), "--log-every", "1", "--no-evaluate", "--profile")


def test_norms_and_profile_of_two_ranks_are_those_of_one(data_dir: Path, tmp_path: Path) -> None:
    data = ("--data-dir", str(data_dir))
    alone, spread = tmp_path / "alone", tmp_path / "spread"
    run_torchrun("-m", "eclip.train", *COMMON, *data, "--run-dir", str(alone), ranks=1)
    said = run_torchrun("-m", "eclip.train", *COMMON, *data, "--micro-batch", "2", "--run-dir", str(spread))
    lines = list(zip(metrics_lines(alone), metrics_lines(spread), strict=True))
    assert len(lines) == STEPS
    for one, two in lines:
        assert one.keys() == two.keys()
        assert {"itc", "entropy", "loss", "positive_share", "logit_scale", "grad_norm", "data_seconds"} <= one.keys()
        parts = [f"grad_norm/{part}" for part in PARTS]
        assert [one[name] for name in parts] == pytest.approx([two[name] for name in parts], rel=1e-3)
        # The parts are the whole, as it was before it was clipped.
        assert sum(one[name] ** 2 for name in parts) ** 0.5 == pytest.approx(one["grad_norm"], rel=1e-4)
    assert said.count("profile of steps 2 to 3 of this start") == 1
    assert {"data", "losses", "backward", "optimizer"} <= names(alone)
    assert {"data", "encode", "targets", "rows", "backward", "optimizer"} <= names(spread)


def names(run_dir: Path) -> set[str]:
    events = json.loads(gzip.decompress((run_dir / "profile" / "trace.json.gz").read_bytes()))["traceEvents"]
    return {event["name"] for event in events if event.get("cat") == "user_annotation"}
