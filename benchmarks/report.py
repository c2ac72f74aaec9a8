"""Turn pytest-benchmark's JSON files into one Markdown page and one JSON file.

    python -m benchmarks.report --out benchmarks/results [--tests tests.xml ...] [--prefix x_] \\
        [--goals slot_attention contrastive train_step] a.json b.json ...

Writes <prefix><device>_<date>.md and .json, and with rows of the contrastive loss a plot of them (contrastive/plot.py).
Goals come first (<op>/goals.py). A row is one benchmark, or one call of a race; `x eager` is the eager reference's
median over the row's, within one op, shape and dtype. Files that are missing or hold no benchmark are named in the
page, not skipped silently, and so is every benchmark that failed or was skipped, where pytest also wrote its JUnit file
beside the JSON (a.xml beside a.json).
"""

import argparse
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.contrastive import goals as contrastive_goals
from benchmarks.contrastive import plot as contrastive_plot
from benchmarks.harness import goals
from benchmarks.harness.goals import Row
from benchmarks.harness.results import read, tests_line
from benchmarks.harness.table import table
from benchmarks.slot_attention import goals as slot_attention_goals
from benchmarks.train_step import goals as train_step_goals

GOALS = {"slot_attention": slot_attention_goals, "contrastive": contrastive_goals, "train_step": train_step_goals}


def judge(rows: list[Row], device: str, ops: Iterable[str] = ("slot_attention", "contrastive")) -> list[goals.Goal]:
    """The goals of `ops` (keys of GOALS) that can be judged on `device`, measured or not."""
    return [goal for op in ops for goal in GOALS[op].judge(rows, device)]


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
    small = any("of_first" not in row for row in rows) or not rows
    lines = [f"# {device}, {machine.get('date', 'no date')}", ""]
    lines += [
        f"{machine.get('processor', 'unknown processor')}, {machine.get('threads', '?')} threads; torch "
        f"{machine.get('torch')}, triton {machine.get('triton')}, transformers {machine.get('transformers')}, Python "
        f"{machine.get('python_version')}, commit {machine.get('commit')}. {tests}",
        "",
    ]
    if judged:
        lines += ["## Goals", "", *goals.table(judged), ""]
        lines += [goals.CPU_REMARK, ""] if device == "cpu" and small else []
    if roofline:
        lines += [
            f"Measured in the same sessions: copy {roofline['copy_bytes_per_s'] / 1e12:.2f} TB/s, bf16 matmul "
            f"{roofline['matmul_flops_per_s'] / 1e12:.0f} TFLOP/s (dense, random data). `must move`: bytes that have "
            "to cross memory; `of copy`: their rate over a copy's; `share`: the least time that these two rates allow "
            "over the median; `±`: interquartile range; `saved`: what autograd keeps for the backward; `held`: by how "
            "much a forward's results and graph grow the memory in use.",
            "",
        ]
    elif small:
        lines += ["On a CPU, small shapes: these rows show that the benchmarks run. No roofline is claimed.", ""]
    if any("of_first" in row for row in rows):
        lines += [
            "Rows that were timed in turns are of full size. `x first`: a call's time over the first row's, the median "
            "of the ratios within a round; `x first, fastest`: of the best times; `x first, CPU time`: of what all "
            "threads used, in the median too. Where they disagree the machine was busy with other things.",
            "",
        ]
    lines += [f"![contrastive loss: time and memory against the batch]({plot})", ""] if plot else []
    for op in dict.fromkeys(r.get("op", "other") for r in rows):
        lines += [f"## {op}", "", table([r for r in rows if r.get("op", "other") == op]), ""]
    lines += [f"- {remark}" for remark in remarks]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("files", nargs="*", type=Path, help="files written by pytest --benchmark-json")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder to write to")
    parser.add_argument("--prefix", default="", help="of the files' names")
    parser.add_argument("--goals", nargs="+", choices=GOALS, default=["slot_attention", "contrastive"], help="of ops")
    parser.add_argument("--tests", nargs="+", type=Path, default=[], help="JUnit files of the tests marked gpu")
    args = parser.parse_args()
    rows, machine, roofline, remarks = read(args.files)
    judged = judge(rows, machine.get("device", "cpu"), args.goals)
    args.out.mkdir(parents=True, exist_ok=True)
    name = args.prefix + re.sub(
        r"[^A-Za-z0-9.-]+", "_", f"{machine.get('device', 'unknown')}_{machine.get('date', 'undated')}"
    )
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
