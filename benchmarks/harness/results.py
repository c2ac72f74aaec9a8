"""Read what pytest left: rows from pytest-benchmark's JSON files, outcomes from the JUnit files beside them."""

import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.harness.goals import Row

MACHINE = ("device", "processor", "threads", "torch", "triton", "transformers", "python_version", "commit", "date")
"""What is kept of pytest-benchmark's machine_info: not the host's name."""

NAMED = 3  # benchmarks skipped for one reason, before the rest is a number


def read(paths: Iterable[Path]) -> tuple[list[Row], dict[str, Any], dict[str, float], list[str]]:
    """Rows, the machine, the best roofline of the sessions, and remarks on files without rows."""
    rows: list[Row] = []
    machine: dict[str, Any] = {}
    roofline: dict[str, float] = {}
    remarks = []
    for path in paths:
        remarks += not_measured(path.with_suffix(".xml"))
        try:
            record = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            remarks.append(
                f"{path.stem}: no result ({type(error).__name__}); it was stopped by the time limit, or failed"
            )
            continue
        machine |= {k: v for k, v in record.get("machine_info", {}).items() if k in MACHINE}
        for name, value in record.get("roofline", {}).items():
            roofline[name] = max(value, roofline.get(name, 0.0))
        found = []
        for benchmark in record.get("benchmarks", []):
            info = dict(benchmark["extra_info"])
            remarks += info.pop("remarks", [])
            own = info.pop("rows", None)  # of a race
            one = {**_spread(benchmark["stats"]), **info}
            found += [{"name": benchmark["fullname"], **row} for row in ([one] if own is None else own)]
        if not found:
            remarks.append(f"{path.stem}: no benchmark ran")
        rows += found
    eager = {_cell(r): r["seconds"] for r in rows if r.get("provider") == "eager"}
    for row in rows:
        if _cell(row) in eager:
            row["speedup"] = eager[_cell(row)] / row["seconds"]
    return rows, machine, roofline, remarks


def not_measured(junit: Path) -> list[str]:
    """Benchmarks that failed or were skipped, each with the first line of the reason; equal reasons share a remark."""
    if not junit.exists():
        return []
    names: dict[tuple[str, str], list[str]] = {}
    for case in ElementTree.parse(junit).getroot().iter("testcase"):
        for outcome in case:
            if outcome.tag in ("failure", "error", "skipped"):
                reason = (outcome.get("message") or "no reason given").splitlines()[0][:200]
                names.setdefault((outcome.tag, reason), []).append(f"`{case.get('name')}`")
    words = {"failure": "failed", "error": "failed", "skipped": "skipped"}
    remarks = []
    for (tag, reason), found in names.items():
        if tag == "skipped" and len(found) > NAMED:
            found[NAMED:] = [f"and {len(found) - NAMED} more"]
        remarks.append(f"{junit.stem}: {words[tag]} ({reason}): {', '.join(found)}")
    return remarks


def _cell(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(k) for k in ("op", "shape", "dtype"))


def _spread(stats: dict[str, float]) -> Row:
    return {"seconds": stats["median"], "iqr": stats["iqr"], "rounds": stats["rounds"]}


def tests_line(paths: Iterable[Path]) -> str:
    """One line on the tests' JUnit files, a shard each: counts, and the names of those that failed."""
    suites = [ElementTree.parse(path).getroot().find("testsuite") if path.exists() else None for path in paths]
    missing = sum(suite is None for suite in suites)
    if missing == len(suites):
        return "Tests marked `gpu`: no result (not run, or stopped by the time limit)."
    count = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    bad = []
    for suite in suites:
        if suite is not None:
            count = {k: n + int(suite.get(k, 0)) for k, n in count.items()}
            failing = (c for c in suite if c.find("failure") is not None or c.find("error") is not None)
            bad += [f"`{c.get('classname')}::{c.get('name')}`" for c in failing]
    failed = count["failures"] + count["errors"]
    passed = count["tests"] - failed - count["skipped"]
    line = f"Tests marked `gpu`: {passed} passed, {failed} failed, {count['skipped']} skipped."
    line += f" Failed: {', '.join(bad)}." if bad else ""
    return line + (f" {missing} of {len(suites)} shards left no result (stopped by the time limit)." if missing else "")
