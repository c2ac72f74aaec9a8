"""What a reader sees: one table a task, as plain text and as JSON."""

import math
import textwrap
from dataclasses import asdict, dataclass, field
from typing import Any, Literal


@dataclass(kw_only=True)
class Table:
    """One task's numbers: rows of metrics; a row may lack a metric that it has no meaning for."""

    title: str
    rows: dict[str, dict[str, float]]
    counts: dict[str, int] = field(default_factory=dict)
    """What was counted: queries, gallery, classes, ..."""
    note: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    """Choices made outside the test split, such as thresholds."""
    unit: Literal["share", "nats"] = "share"
    """share: every metric lies in [0, 1], and is shown in %."""

    def undefined(self) -> list[str]:
        """Metrics without a finite value."""
        cells = ((name, metric, value) for name, row in self.rows.items() for metric, value in row.items())
        return [f"{name}: {metric} is {value}" for name, metric, value in cells if not math.isfinite(value)]

    def to_dict(self) -> dict[str, Any]:
        """For JSON: None, and a list of reasons, where a metric has no finite value."""
        rows = {
            name: {metric: value if math.isfinite(value) else None for metric, value in row.items()}
            for name, row in self.rows.items()
        }
        undefined = self.undefined()
        return {**asdict(self), "rows": rows, **({"undefined": undefined} if undefined else {})}


def format_table(table: Table) -> str:
    """The table as text: title with counts, one line a row, percentages with one decimal (nats with two)."""
    counts = ", ".join(f"{value} {name}" for name, value in table.counts.items())
    head = f"{table.title} ({counts})" if counts else table.title
    columns = list(dict.fromkeys(name for row in table.rows.values() for name in row))
    first = max([len(name) for name in table.rows] + [24])
    widths = [max(len(name), 6) for name in columns]
    lines = [head, " " * first + "".join(f"  {name:>{width}}" for name, width in zip(columns, widths, strict=True))]
    for name, row in table.rows.items():
        cells = (_format(row[c], table.unit) if c in row else "" for c in columns)
        lines.append(f"{name:<{first}}" + "".join(f"  {cell:>{w}}" for cell, w in zip(cells, widths, strict=True)))
    notes = [note for note in (table.note, *(f"undefined: {text}" for text in table.undefined())) if note]
    for note in notes:
        lines += textwrap.wrap(note, 110, initial_indent="  ", subsequent_indent="  ")
    return "\n".join(lines)


def _format(value: float, unit: str) -> str:
    if not math.isfinite(value):
        return "-"
    return f"{value:.2f}" if unit == "nats" else f"{100 * value:.1f}"
