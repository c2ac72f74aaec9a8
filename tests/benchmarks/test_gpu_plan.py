"""The plans of gpu.sh: every benchmark is in one of them, and the parts of each end within nine minutes."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PLANS = ("kernels", "step")


def script() -> str:
    return (ROOT / "benchmarks/gpu.sh").read_text().replace("\\\n", " ")


def plan_of(name: str) -> list[tuple[str, int, str]]:
    """(name, seconds, rest) of every timed part."""
    (body,) = re.findall(rf"^{name}_plan\(\) \{{\n(.+?)^\}}", script(), re.MULTILINE | re.DOTALL)
    return [
        (part, int(limit), rest) for part, limit, rest in re.findall(r"^bench (\S+) (\d+) (.+)", body, re.MULTILINE)
    ]


def test_gpu_plans_name_every_benchmark() -> None:
    files = {str(path.relative_to(ROOT)) for path in (ROOT / "benchmarks").rglob("bench_*.py")}
    assert files, "no benchmark is where this test looks"
    parts = [rest for name in PLANS for _, _, rest in plan_of(name)]
    assert {file for rest in parts for file in re.findall(r"benchmarks/\w+/bench_\w+\.py", rest)} == files


@pytest.mark.parametrize("plan", PLANS)
def test_a_gpu_plan_fits_its_budget(plan: str) -> None:
    (beside_each_other,) = set(re.findall(r"part (\d+) ", script()))  # tests and caches run at the same time
    (budget,) = re.findall(r"^budget=\$\{BUDGET:-(\d+)\}", script(), re.MULTILINE)
    total = int(beside_each_other) + sum(limit for _, limit, _ in plan_of(plan))
    assert f"add up to {total}" in script()
    assert total < int(budget) < 9 * 60


def test_the_gpu_plan_leaves_time_for_a_million_pairs() -> None:
    limits = {name: limit for name, limit, _ in plan_of("kernels")}
    assert limits["contrastive_loss_ours"] >= 70  # about 40 s of it are expected, a third of them for 262k and 1M pairs


def test_every_test_of_the_step_benchmark_is_in_the_plan() -> None:
    text = (ROOT / "benchmarks/train_step/bench_train_step.py").read_text()
    chosen = [word for _, _, rest in plan_of("step") for word in re.findall(r"test_\w+", rest.partition("-k")[2])]
    for test in re.findall(r"^def (test_\w+)", text, re.MULTILINE):
        assert sum(test.startswith(word) for word in chosen) == 1, test


def test_gpu_plans_find_the_tests_that_a_fixture_marks() -> None:
    """Files that name the marker, and those beside or below a conftest.py that does; each in one plan."""
    (find,) = re.findall(r"^gpu_tests\(\) \{\n.+?^\}", script(), re.MULTILINE | re.DOTALL)
    chosen: list[str] = []
    for plan in PLANS:
        command = f"set -euo pipefail; {find}\ngpu_tests {plan}"
        chosen += subprocess.run(
            ["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.split()
    marking = [path for path in (ROOT / "tests").rglob("*.py") if re.search(r"\bmark\.gpu\b", path.read_text())]
    found = {path for path in marking if path.name.startswith("test_")}
    found |= {test for path in marking if path.name == "conftest.py" for test in path.parent.rglob("test_*.py")}
    assert found and {str(path.relative_to(ROOT)) for path in found} == set(chosen)
    assert len(chosen) == len(set(chosen))
    _assert_collected_without(("tyro", "nvidia.dali", "xformers"), chosen)


def _assert_collected_without(missing: tuple[str, ...], files: list[str]) -> None:
    """A bare GPU machine lacks these packages; a file that imports one at its top would count as failed there."""
    code = "import sys, pytest; sys.modules.update(dict.fromkeys(sys.argv[1].split(','))); "
    code += "sys.exit(pytest.main(['--collect-only', '-q', '-p', 'no:cacheprovider', *sys.argv[2:]]))"
    command = [sys.executable, "-c", code, ",".join(missing), *files]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]


def test_an_unknown_plan_is_refused() -> None:
    run = subprocess.run(["bash", "benchmarks/gpu.sh", "x", "both"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr == "gpu.sh: both is no plan; use kernels or step\n"
