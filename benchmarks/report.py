"""Turn pytest-benchmark's JSON files into one Markdown page and one JSON file.

    python -m benchmarks.report --out benchmarks/results [--tests tests.xml ...] a.json b.json ...

Writes <device>_<date>.md and .json, and with rows of the contrastive loss a plot of them (contrastive_plot.py). Goals
come first (goals.py). A row is one benchmark; `x eager` is the eager reference's median over the row's, within one op,
shape and dtype. Files that are missing or hold no benchmark are named in the page, not skipped silently, and so is
every benchmark that failed or was skipped, where pytest also wrote its JUnit file beside the JSON (a.xml beside
a.json).
"""

import argparse
import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.contrastive import goals as contrastive_goals
from benchmarks.contrastive import plot as contrastive_plot
from benchmarks.harness import goals
from benchmarks.slot_attention import goals as slot_attention_goals

Row = dict[str, Any]
MACHINE = ("device", "torch", "triton", "python_version", "commit", "date")
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
        found = [
            {"name": b["fullname"], **_spread(b["stats"]), **b["extra_info"]} for b in record.get("benchmarks", [])
        ]
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


COLUMNS = {
    "provider": lambda r: r.get("provider", r["name"]),
    "shape": lambda r: r.get("shape", ""),
    "dtype": lambda r: r.get("dtype", ""),
    "median": lambda r: f"{_time(r['seconds'])} ± {_time(r['iqr'])}",
    "x eager": lambda r: f"{r['speedup']:.2f}" if "speedup" in r else "",
    "must move": lambda r: _bytes(r.get("bytes")),
    "GB/s": lambda r: f"{r['gb_per_s']:.0f}" if "gb_per_s" in r else "",
    "of copy": lambda r: f"{r['copy_share']:.0%}" if "copy_share" in r else "",
    "TFLOP/s": lambda r: f"{r['tflop_per_s']:.3g}" if "tflop_per_s" in r else "",
    "images/s": lambda r: f"{r['images_per_s']:.0f}" if "images_per_s" in r else "",
    "share": lambda r: f"{r['share']:.0%} ({r['bound']})" if "share" in r else "",
    "peak memory": lambda r: _bytes(r.get("peak_bytes")),
    "saved": lambda r: _bytes(r.get("saved")),
    "held": lambda r: _bytes(r.get("held")),
    "error": lambda r: f"{r['error']:.1e}" if "error" in r else "",
    "timed as": lambda r: r.get("timing", ""),
}
STANDARD = {
    *("op", "provider", "shape", "dtype", "bytes", "flops", "device", "timing", "note", "seconds", "iqr", "rounds"),
    *("name", "gb_per_s", "copy_share", "tflop_per_s", "share", "bound", "peak_bytes", "speedup", "images_per_s"),
    *("saved", "held", "error", "errors"),
}


def _time(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e3)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def _bytes(count: int | None) -> str:
    if not count:
        return ""
    return f"{count / 1e6:.0f} MB" if count >= 1e7 else f"{count / 1e6:.3g} MB"


def table(rows: list[Row]) -> str:
    """One Markdown table; columns that are empty everywhere are left out, a benchmark's own columns come last."""
    own = dict.fromkeys(k for r in rows for k in r if k not in STANDARD)
    cells = {name: [cell(r) for r in rows] for name, cell in COLUMNS.items()}
    cells |= {k: [f"{v:.3g}" if isinstance(v := r.get(k, ""), float) else str(v) for r in rows] for k in own}
    cells = {name: column for name, column in cells.items() if any(column)}
    lines = [list(cells), ["---"] * len(cells), *zip(*cells.values(), strict=True)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


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


def judge(rows: list[Row], device: str) -> list[goals.Goal]:
    """The goals of every op that can be judged on `device`."""
    return [*slot_attention_goals.judge(rows, device), *contrastive_goals.judge(rows, device)]


def page(
    rows: list[Row],
    machine: dict[str, Any],
    roofline: dict[str, float],
    remarks: list[str],
    tests: str,
    judged: list[goals.Goal],
    plot: str | None,
) -> str:
    """The whole Markdown page."""
    device = machine.get("device", "unknown device")
    lines = [f"# {device}, {machine.get('date', 'no date')}", ""]
    lines += [
        f"torch {machine.get('torch')}, triton {machine.get('triton')}, Python {machine.get('python_version')}, "
        f"commit {machine.get('commit')}. {tests}",
        "",
    ]
    if judged:
        lines += ["## Goals", "", *goals.table(judged), ""]
        lines += [goals.CPU_REMARK, ""] if device == "cpu" else []
    if roofline:
        lines += [
            f"Measured in the same sessions: copy {roofline['copy_bytes_per_s'] / 1e12:.2f} TB/s, bf16 matmul "
            f"{roofline['matmul_flops_per_s'] / 1e12:.0f} TFLOP/s (dense, random data). `must move`: bytes that have "
            "to cross memory; `of copy`: their rate over a copy's; `share`: the least time that these two rates allow "
            "over the median; `±`: interquartile range; `saved`: what autograd keeps for the backward; `held`: by how "
            "much a forward's results and graph grow the memory in use.",
            "",
        ]
    else:
        lines += ["On a CPU, small shapes: these rows show that the benchmarks run. No roofline is claimed.", ""]
    lines += [f"![contrastive loss: time and memory against the batch]({plot})", ""] if plot else []
    for op in dict.fromkeys(r.get("op", "other") for r in rows):
        lines += [f"## {op}", "", table([r for r in rows if r.get("op", "other") == op]), ""]
    lines += [f"- {remark}" for remark in remarks]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("files", nargs="*", type=Path, help="files written by pytest --benchmark-json")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder to write to")
    parser.add_argument("--tests", nargs="+", type=Path, default=[], help="JUnit files of the tests marked gpu")
    args = parser.parse_args()
    rows, machine, roofline, remarks = read(args.files)
    judged = judge(rows, machine.get("device", "cpu"))
    args.out.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^A-Za-z0-9.-]+", "_", f"{machine.get('device', 'unknown')}_{machine.get('date', 'undated')}")
    plot = args.out / f"{name}_contrastive_loss.png"
    try:
        drawn = contrastive_plot.draw(rows, machine, plot)
    except ImportError as error:
        remarks.append(f"no plot: {error}")
        drawn = False
    text = page(rows, machine, roofline, remarks, tests_line(args.tests), judged, plot.name if drawn else None)
    (args.out / f"{name}.md").write_text(text)
    found = [goal._asdict() for goal in judged]
    keep = {"machine": machine, "roofline": roofline, "goals": found, "remarks": remarks, "rows": rows}
    (args.out / f"{name}.json").write_text(json.dumps(keep, indent=1) + "\n")
    print("\n".join([text, "Goals once more:", "", *goals.table(judged)]))


if __name__ == "__main__":
    main()
