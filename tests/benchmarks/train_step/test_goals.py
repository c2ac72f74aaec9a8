"""Goals of the training step: judged on the GPUs they were set for, shown elsewhere."""

from typing import Any

import pytest

from benchmarks.train_step import goals


def row(op: str, provider: str, seconds: float, **columns: Any) -> dict[str, Any]:
    return {"op": op, "provider": provider, "seconds": seconds, "shape": "B=256", **columns}


GPU_ROWS = [
    row(goals.OPTIONS, "ours", 0.12, mfu=0.35),
    row(goals.OPTIONS, "ours, compiled", 0.09, mfu=0.47),
    row(goals.OPTIONS, "open_clip", 0.05, mfu=0.6),
    row(goals.OPTIONS, "reference", 0.18, mfu=0.2),
    row(goals.LARGE, "ours, compiled", 6.0, products=goals.LARGE_BATCH),
]


def test_a_run_that_reaches_every_goal() -> None:
    found = goals.judge(GPU_ROWS, "NVIDIA H200")
    assert [(g.measured, g.met) for g in found] == [("47%", True), ("2.00", True), ("16384", True)]
    assert "ours, compiled" in found[0].goal, "of our options alone"


def test_other_gpus_are_shown_and_not_judged() -> None:
    assert [g.met for g in goals.judge(GPU_ROWS, "NVIDIA A100")] == [None, True, None]


def test_what_was_not_measured_is_not_met() -> None:
    rows = [row(goals.OPTIONS, "reference", 0.18)]
    assert [g.measured for g in goals.judge(rows, "NVIDIA H100")] == ["not measured"] * 3


def test_a_goal_is_missed() -> None:
    slow = [row(goals.OPTIONS, "ours", 0.15, mfu=0.3), GPU_ROWS[3]]
    assert [g.met for g in goals.judge(slow, "NVIDIA H100")] == [False, False, None]


def test_a_cpu_shows_ratios() -> None:
    op = goals.DEMO["demo"]
    rows = [row(op, "ours", 1.0, of_first=1.0), row(op, "plain", 1.5, of_first=1.5)]
    (found,) = goals.judge(rows, "cpu")
    assert (found.measured, found.met) == ("1.50", None)


@pytest.mark.parametrize("device, count", [("cpu", 0), ("NVIDIA H100", 3)])
def test_rows_of_other_ops_say_nothing(device: str, count: int) -> None:
    found = goals.judge([row("slot_attention", "ours", 1.0)], device)
    assert [g.measured for g in found] == ["not measured"] * count
