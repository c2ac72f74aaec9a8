"""Goals as lines of a table. What they require is in <op>/goals.py, each with judge(rows, device) -> list of goals."""

from collections.abc import Iterable
from typing import Any, NamedTuple

Row = dict[str, Any]
CPU_REMARK = "Times on a CPU say nothing about the kernels: goals that are times or errors are judged on a GPU alone."


class Goal(NamedTuple):
    """One line of the table; `met` is None where nothing was required or measured."""

    goal: str
    required: str
    measured: str
    met: bool | None


def goal(
    text: str, required: str, value: float | None, form: str, bound: float | None, *, at_most: bool = False
) -> Goal:
    """`value` against `bound`, shown by `form`. No value: not measured; no bound: shown and not judged."""
    if value is None:
        return Goal(text, required, "not measured", None)
    met = None if bound is None else value <= bound if at_most else value >= bound
    return Goal(text, required, form.format(value), met)


def table(goals: Iterable[Goal]) -> list[str]:
    """Markdown lines."""
    words = {True: "yes", False: "**no**", None: "-"}
    lines = ["| goal | required | measured | met |", "| --- | --- | --- | --- |"]
    return lines + [f"| {g.goal} | {g.required} | {g.measured} | {words[g.met]} |" for g in goals]
