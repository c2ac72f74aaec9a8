"""The contrastive loss's goals, judged from rows."""

from benchmarks.contrastive import goals
from tests.benchmarks.contrastive.rows import a_run


def test_goals_are_judged_from_the_rows() -> None:
    judged = goals.judge(a_run(), "NVIDIA H200")
    assert [(g.required, g.measured, g.met) for g in judged] == [
        ("<= 8.5", "8", True),
        ("<= 130", "140", False),
        (">= 65%", "70%", True),
        (">= 2", "3.00", True),
        (">= 2", "1.88", False),
        (">= 1", "1.88", True),
        ("<= 3", "2.90", True),
        ("<= 20", "21.00", False),
        ("<= 1", "0.800", True),
        ("<= 1", "1.500", False),
        ("<= 51%", "50.5%", True),
    ]
    assert "open_clip of 3" in judged[5].goal
    assert "memeff of 3" in judged[8].goal and "memeff of 2" in judged[9].goal


def test_milliseconds_are_judged_on_an_h200_alone() -> None:
    times = goals.judge(a_run(), "NVIDIA H100 80GB HBM3")[:3]
    assert [g.met for g in times] == [None, None, True]
    assert all("not judged here" in g.goal for g in times[:2])


def test_a_cpu_judges_the_traffic_alone() -> None:
    assert [g.measured for g in goals.judge(a_run(), "cpu")] == ["50.5%"]


def test_nothing_measured_nothing_judged() -> None:
    rows = [r | {"dtype": "float32"} for r in a_run()]
    for judged in (goals.judge([], "NVIDIA H200"), goals.judge(rows, "NVIDIA H200")):
        assert {g.measured for g in judged} == {"not measured"} and {g.met for g in judged} == {None}
