"""What --profile writes, of which steps, and that it stays out of the way otherwise."""

import dataclasses
import gzip
import json
from pathlib import Path

import pytest
import torch

from eclip.files import CannotWrite
from eclip.training.metrics.profiler import FOLDER, PASSED_OVER, TABLE, TRACE, TRACED, WARM_UP, StepProfiler
from eclip.training.metrics.spans import span
from tests.training.run_folders import ALONE


def take_steps(profiler: StepProfiler, count: int, *, fails: bool = False) -> None:
    with profiler:
        for step in range(1, count + 1):
            with span(f"step {step}"):
                torch.ones(3, 4) @ torch.ones(4, 5)
            profiler.step()
        if fails:
            raise KeyError


def traced(folder: Path) -> list[int]:
    """Numbers of the steps in the trace."""
    events = json.loads(gzip.decompress((folder / FOLDER / TRACE).read_bytes()))["traceEvents"]
    names = {event.get("name", "") for event in events if event.get("cat") == "user_annotation"}
    return sorted(int(name.split()[1]) for name in names if name.startswith("step "))


@pytest.mark.parametrize(
    ("count", "steps"),
    [(30, [6, 7, 8, 9, 10]), (8, [4, 5, 6, 7, 8]), (6, [2, 3, 4, 5, 6]), (4, [2, 3, 4])],
)
def test_five_steps_after_the_first_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], count: int, steps: list[int]
) -> None:
    take_steps(StepProfiler(tmp_path, ALONE, on=True, steps=count), count)
    assert traced(tmp_path) == steps
    table = (tmp_path / FOLDER / TABLE).read_text()
    assert "aten::mm" in table
    assert "[[3, 4], [4, 5]]" in table
    assert sorted(p.name for p in (tmp_path / FOLDER).iterdir()) == [TABLE, TRACE]
    said = capsys.readouterr().out.splitlines()
    assert [line for line in said if "profile of steps" in line] == [
        f"profile of steps {steps[0]} to {steps[-1]} of this start: {tmp_path / FOLDER / TABLE}, "
        f"{tmp_path / FOLDER / TRACE}"
    ]
    assert PASSED_OVER + WARM_UP + 1 == 6 and TRACED == 5


@pytest.mark.parametrize("case", ["off", "another rank"])
def test_nothing_is_written_otherwise(tmp_path: Path, case: str) -> None:
    ranks = ALONE if case == "off" else dataclasses.replace(ALONE, rank=1)
    take_steps(StepProfiler(tmp_path, ranks, on=case != "off", steps=20), 20)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("taken", [1, 7])
def test_a_run_that_breaks_off_keeps_no_trace(tmp_path: Path, taken: int) -> None:
    with pytest.raises(KeyError):
        take_steps(StepProfiler(tmp_path, ALONE, on=True, steps=20), taken, fails=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("planned, taken, passed", [(20, 3, 5), (20, 5, 5), (1, 1, 1), (0, 0, 1)])
def test_a_run_that_ends_before_the_traced_steps_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], planned: int, taken: int, passed: int
) -> None:
    """Stopped, or too short: a flag does not do nothing without a word."""
    take_steps(StepProfiler(tmp_path, ALONE, on=True, steps=planned), taken)
    assert not list(tmp_path.iterdir())
    assert f"no trace: {taken} steps of this start, of which the first {passed} are passed" in capsys.readouterr().out


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / FOLDER).write_text("a file")
    with pytest.raises(CannotWrite, match="cannot be written"):
        take_steps(StepProfiler(tmp_path, ALONE, on=True, steps=20), 20)
