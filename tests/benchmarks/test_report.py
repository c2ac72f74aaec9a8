"""The results page: goals judged from rows, failures named, shards of the tests added up."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report
from benchmarks.harness import goals
from benchmarks.slot_attention import goals as slots
from benchmarks.slot_attention.bench_slot_attention import PAPER_DIM, PAPER_QUERIES, PAPER_TOKENS, SHAPES

SMALL = slots.label(1, 196, 20, 768, 1)


def row(op: str, provider: str, seconds: float, shape: str = slots.SHAPE, **columns: Any) -> dict[str, Any]:
    return {"op": op, "provider": provider, "shape": shape, "dtype": "bfloat16", "seconds": seconds, **columns}


def a_run() -> list[dict[str, Any]]:
    """Core forward reaches its goal, backward does not; 4x eager, 2x compile; 0.2 of activations; 1.5x the error."""
    both = f"{slots.BLOCK} {slots.BOTH}"
    return [
        row(f"{slots.CORE} {slots.FORWARD}", "ours", 1e-3, copy_share=0.61),
        row(f"{slots.CORE} {slots.BACKWARD}", "ours", 1e-3, copy_share=0.49),
        row(both, "eager", 8e-3, errors={"q": 1e-3, "tokens": 4e-3}),
        row(both, "compile", 4e-3, errors={"q": 1e-3, "tokens": 4e-3}),
        row(both, "ours", 2e-3, errors={"q": 1.5e-3, "tokens": 1e-3}),
        row(f"{slots.SIX_BLOCKS} {slots.BOTH}", "eager", 1e-2, SMALL, saved=1000),
        row(f"{slots.SIX_BLOCKS} {slots.BOTH}", "ours", 1e-2, SMALL, saved=200),
        row(f"{slots.DECODER} {slots.BOTH}", "eager", 1e-2, SMALL, saved=1000),
        row(f"{slots.DECODER} {slots.BOTH}", "ours", 1e-2, SMALL, saved=600),
    ]


def pytest_benchmark_file(path: Path, rows: list[dict[str, Any]], device: str) -> Path:
    def benchmark(row: dict[str, Any]) -> dict[str, Any]:
        stats = {"median": row["seconds"], "iqr": 1e-6, "rounds": 30}
        return {"fullname": row["op"], "stats": stats, "extra_info": {k: v for k, v in row.items() if k != "seconds"}}

    roofline = {} if device == "cpu" else {"copy_bytes_per_s": 4e12, "matmul_flops_per_s": 8e14}
    record = {
        "machine_info": {"device": device, "torch": "2", "date": "2000-01-01", "node": "secret"},
        "roofline": roofline,
        "benchmarks": [benchmark(row) for row in rows],
    }
    path.write_text(json.dumps(record))
    return path


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


@pytest.mark.parametrize("device", ["NVIDIA X", "cpu"])
def test_page_and_record(device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = pytest_benchmark_file(tmp_path / "slots.json", a_run(), device)
    (tmp_path / "slots.xml").write_text(
        '<testsuites><testsuite><testcase name="a"/><testcase name="b"><failure message="Broken\nmore"/></testcase>'
        '<testcase name="c"><skipped message="out of memory"/></testcase></testsuite></testsuites>'
    )
    tests = []
    for index, bad in enumerate(("", '<failure message="x"/>')):
        tests.append(tmp_path / f"tests.{index}.xml")
        tests[-1].write_text(
            f'<testsuites><testsuite tests="3" failures="{int(bool(bad))}" errors="0" skipped="1">'
            f'<testcase classname="t" name="one">{bad}</testcase></testsuite></testsuites>'
        )
    missing = tmp_path / "stopped.json"
    arguments = ["report", "--out", str(tmp_path / "out"), "--tests", *map(str, tests), str(tmp_path / "tests.2.xml")]
    monkeypatch.setattr(sys, "argv", [*arguments, "--", str(found), str(missing)])
    report.main()
    (page,) = (tmp_path / "out").glob("*.md")
    text = page.read_text()
    assert text.index("| goal | required | measured | met |") < text.index(f"## {slots.CORE}")
    assert (goals.CPU_REMARK in text) == (device == "cpu")
    assert ("| **no** |" in text) and ("| yes |" in text) == (device != "cpu")
    assert "3 passed, 1 failed, 2 skipped. Failed: `t::one`. 1 of 3 shards left no result" in text
    assert "- slots: failed (Broken more): `b`" in text  # XML turns a line break of an attribute into a space
    assert "- slots: skipped (out of memory): `c`" in text
    assert "- stopped: no result" in text
    assert "secret" not in text
    record = json.loads(page.with_suffix(".json").read_text())
    assert [g["met"] for g in record["goals"]] == [g.met for g in report.judge(a_run(), device)]
    assert len(record["rows"]) == len(a_run())


def test_many_skipped_for_one_reason_are_counted(tmp_path: Path) -> None:
    cases = "".join(f'<testcase name="t{i}"><skipped message="not installed"/></testcase>' for i in range(5))
    (tmp_path / "x.xml").write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    assert report.not_measured(tmp_path / "x.xml") == ["x: skipped (not installed): `t0`, `t1`, `t2`, and 2 more"]
