"""Tables as text and as JSON."""

import json
import math

from eclip.evaluate.report.tables import Table, format_table


def test_what_is_undefined_is_null_with_a_reason() -> None:
    table = Table(title="t", rows={"a": {"x": 0.5, "y": math.nan}, "b": {"x": math.inf}}, note="as given", unit="nats")
    record = json.loads(json.dumps(table.to_dict(), allow_nan=False))
    assert record["rows"] == {"a": {"x": 0.5, "y": None}, "b": {"x": None}}
    assert record["undefined"] == ["a: y is nan", "b: x is inf"]
    lines = format_table(table).splitlines()
    assert lines[2].split() == ["a", "0.50", "-"] and lines[3].split() == ["b", "-"]
    assert lines[4:] == ["  as given", "  undefined: a: y is nan", "  undefined: b: x is inf"]


def test_a_sound_table_has_no_such_list() -> None:
    table = Table(title="t", rows={"a": {"x": 0.5}}, counts={"images": 3})
    assert "undefined" not in table.to_dict()
    assert format_table(table).splitlines()[0] == "t (3 images)" and "50.0" in format_table(table)
