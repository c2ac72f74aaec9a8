"""A race: in turns, another one first each time, ratios within a round."""

import json
from pathlib import Path

import pytest

from benchmarks.harness import race
from benchmarks.harness.results import read
from benchmarks.harness.table import table


def test_calls_take_turns_and_another_one_begins_each_time() -> None:
    order: list[str] = []
    contest = race.Race({name: (lambda name=name: order.append(name)) for name in "abc"})
    for _ in range(3):
        contest.turn()
    assert "".join(order) == "abcbcacab"
    assert [row["provider"] for row in contest.rows()] == ["a", "b", "c"]
    assert all(row["rounds"] == 3 for row in contest.rows())


def test_a_slow_minute_moves_no_ratio() -> None:
    contest = race.Race({"ours": lambda: None, "other": lambda: None})
    contest.times = {"ours": [1.0, 10.0, 1.0, 1.0], "other": [2.0, 20.0, 2.2, 2.0]}
    contest.work = {"ours": [1.0, 1.0, 1.0, 0.0], "other": [3.0, 3.0, 3.0, 3.0]}
    ours, other = contest.rows()
    assert (ours["of_first"], ours["of_fastest"], ours["fastest"]) == (1, 1, 1)
    assert other["of_first"] == pytest.approx(2)
    assert other["of_fastest"] == pytest.approx(2)
    assert other["fastest"] == 2
    assert other["of_work"] == 3


def test_a_warm_up_is_forgotten() -> None:
    contest = race.Race({"ours": lambda: None})
    contest.turn()
    contest.forget()
    contest.turn()
    assert contest.rows()[0]["rounds"] == 1


@pytest.mark.parametrize("a_round, rounds", [(1.0, 30), (100.0, race.LEAST), (1e-3, race.MOST)])
def test_rounds_fill_the_time(a_round: float, rounds: int) -> None:
    assert race.rounds_for(a_round, 30.0) == rounds


def test_rows_of_a_race_are_rows_of_the_page(tmp_path: Path) -> None:
    contest = race.Race({"ours": lambda: None, "other": lambda: None})
    contest.times = {"ours": [0.1, 0.1], "other": [0.3, 0.3]}
    contest.work = {"ours": [0.2, 0.2], "other": [0.5, 0.5]}
    rows = [{"op": "step", "shape": "B=4", **row} for row in contest.rows()]
    info = {"rows": rows, "remarks": ["a peer is missing"]}
    stats = {"median": 9.0, "iqr": 9.0, "rounds": 9}
    path = tmp_path / "race.json"
    path.write_text(json.dumps({"benchmarks": [{"fullname": "f", "stats": stats, "extra_info": info}]}))
    found, _, _, remarks = read([path])
    assert remarks == ["a peer is missing"]
    assert [row["seconds"] for row in found] == [0.1, 0.3]
    assert "| other | B=4 | 300 ms ± 0 µs | 300 ms | 3.00 | 3.00 | 2.50 |" in table(found)
