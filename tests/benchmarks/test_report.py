"""The results page: goals first, failures named, shards of the tests added up."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report
from benchmarks.harness import goals
from benchmarks.slot_attention import goals as slots
from tests.benchmarks.slot_attention.rows import a_run


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
