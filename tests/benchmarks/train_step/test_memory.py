"""Memory of a step: the counter is right on calls whose peak is known, and the script writes its page."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.train_step.memory import Point, measure, peak_bytes, slope
from tests.benchmarks.train_step.small import SMALL
from tests.helpers import ROOT

MB = 2**20


def floats(megabytes: int) -> torch.Tensor:
    return torch.zeros(megabytes * MB // 4)


def test_the_peak_is_of_what_lives_at_once() -> None:
    def call() -> torch.Tensor:
        one = floats(8)
        two = floats(4)
        del one
        return floats(6) + two[:1]  # 4, 6, and 6 of the sum

    assert peak_bytes(call) == pytest.approx(16 * MB, rel=0.01)


def test_what_was_there_before_does_not_count() -> None:
    kept = [floats(32)]

    def call() -> None:
        kept.pop()
        floats(5)

    assert peak_bytes(call) == pytest.approx(5 * MB, abs=4096)


def test_memory_is_that_of_a_micro_batch_and_the_same_each_time() -> None:
    whole = [measure(SMALL, batch, None) for batch in (32, 64)]
    split = [measure(SMALL, batch, 8) for batch in (32, 64)]
    assert measure(SMALL, 64, 8) == split[1]
    assert whole[1].peak == pytest.approx(2 * whole[0].peak, rel=0.15), "grows with the batch"
    assert slope(split) < 0.25 * slope(whole), "does not grow with it"
    assert split[1].peak < 0.5 * whole[1].peak


def test_a_micro_batch_as_large_as_the_batch_is_none() -> None:
    assert measure(SMALL, 8, 8).micro_batch is None


def test_slope_is_bytes_a_product() -> None:
    assert slope([Point(10, None, 500, 0), Point(30, None, 900, 0), Point(20, None, 700, 0)]) == 20


def test_the_script_writes_a_table_and_a_plot(tmp_path: Path) -> None:
    arguments = ["--preset", "debug", "--batches", "16", "32", "--micro-batch", "8", "--out", str(tmp_path)]
    command = [sys.executable, "-m", "benchmarks.train_step.memory", *arguments]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    (page,) = tmp_path.glob("train_step_memory_*.md")
    (plot,) = tmp_path.glob("train_step_memory_*.png")
    text = page.read_text()
    assert text in run.stdout
    assert f"]({plot.name})" in text
    assert text.count("\n| ") == 3, "a head and a line a batch"
    assert plot.stat().st_size > 5000
