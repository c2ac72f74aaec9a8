"""Slot attention's goals, judged from rows."""

from benchmarks.slot_attention import goals as slots
from benchmarks.slot_attention.bench_slot_attention import PAPER_DIM, PAPER_QUERIES, PAPER_TOKENS, SHAPES
from tests.benchmarks.slot_attention.rows import SMALL, a_run


def test_goals_are_judged_from_the_rows() -> None:
    judged = slots.judge(a_run(), "NVIDIA")
    assert [(g.required, g.measured, g.met) for g in judged] == [
        (">= 60%", "61%", True),
        (">= 50%", "49%", False),
        (">= 3.5", "4.00", True),
        (">= 3.0", "2.00", False),
        ("<= 15%", "20.0%", False),
        ("-", "60.0%", None),
        ("<= 2", "1.50", True),
    ]
    assert "worst: q of slot_attention forward+backward" in judged[-1].goal


def test_rows_of_other_shapes_and_dtypes_do_not_count() -> None:
    rows = [r | {"shape": SMALL} for r in a_run()[:5]] + [r | {"dtype": "float32"} for r in a_run()[5:]]
    judged = slots.judge(rows, "NVIDIA")
    assert [g.measured for g in judged[:-1]] == ["not measured"] * 6
    assert all(g.met is None for g in judged[:-1])
    assert slots.judge([], "NVIDIA")[-1].measured == "not measured"


def test_a_cpu_judges_bytes_alone() -> None:
    assert [g.measured for g in slots.judge(a_run(), "cpu")] == ["20.0%", "60.0%"]


def test_goals_speak_of_shapes_that_are_measured() -> None:
    batch, queries, heads = SHAPES["B4096"]
    assert slots.label(batch, PAPER_TOKENS, queries, PAPER_DIM, heads) == slots.SHAPE
    assert queries == PAPER_QUERIES
