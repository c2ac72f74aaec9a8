"""The benchmark's GPU part on a CPU, with its tiny model: from pytest to the page, as gpu.sh goes."""

import os
import subprocess
import sys
from pathlib import Path

from benchmarks.train_step import goals, kinds
from tests.helpers import ROOT

CHOSEN = "test_where or (test_micro_batch and 512) or test_large_batch or (test_option and blocks)"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    # pytest-benchmark writes nothing in a worker of xdist, and would take the program for one.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)


def test_rows_of_the_step_come_to_the_page(tmp_path: Path) -> None:
    found = tmp_path / "step.json"
    options = ["-q", "-p", "no:cacheprovider", "-k", CHOSEN, f"--benchmark-json={found}", "--benchmark-quiet"]
    measured = run("pytest", "benchmarks/train_step/bench_train_step.py", *options)
    assert measured.returncode == 0, measured.stdout + measured.stderr
    written = run(
        "benchmarks.report", "--prefix", "step_", "--goals", "train_step", "--out", str(tmp_path / "out"), str(found)
    )
    assert written.returncode == 0, written.stderr
    (page,) = (tmp_path / "out").glob("step_cpu_*.md")
    text = page.read_text()
    for op in (goals.OPTIONS, goals.MICRO, goals.LARGE, goals.KINDS):
        assert f"\n## {op}\n" in text
    assert "| products/s |" in text
    assert "| B=64 micro=8 |" in text, "what stands for the batch of 16k, in micro-batches"
    assert all(f"| {kind} " in text for kind in kinds.NAMES)
    assert "transformers" in text.splitlines()[2], "versions and processor stand at the top"
