"""The plan of gpu.sh: every benchmark is in it, and its parts end within nine minutes."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_gpu_plan_names_every_benchmark_and_fits_its_budget() -> None:
    plan = (ROOT / "benchmarks/gpu.sh").read_text().replace("\\\n", " ")
    timed = re.findall(r"^bench \S+ (\d+) (.+)", plan, re.MULTILINE)
    files = {str(path.relative_to(ROOT)) for path in (ROOT / "benchmarks").rglob("bench_*.py")}
    assert files, "no benchmark is where this test looks"
    assert {file for _, rest in timed for file in re.findall(r"benchmarks/\w+/bench_\w+\.py", rest)} == files
    (beside_each_other,) = set(re.findall(r"part (\d+) ", plan))  # tests and caches run at the same time
    (budget,) = re.findall(r"^budget=\$\{BUDGET:-(\d+)\}", plan, re.MULTILINE)
    total = int(beside_each_other) + sum(int(limit) for limit, _ in timed)
    assert f"add up to {total}" in plan
    assert total < int(budget) < 9 * 60
    limits = {name: int(limit) for name, limit in re.findall(r"^bench (\S+) (\d+)", plan, re.MULTILINE)}
    assert limits["contrastive_loss_ours"] >= 70  # about 40 s of it are expected, a third of them for 262k and 1M pairs


def test_gpu_plan_finds_the_tests_that_a_fixture_marks() -> None:
    """Files that name the marker, and those beside or below a conftest.py that does."""
    find = "\n".join(re.findall(r"^mapfile .+", (ROOT / "benchmarks/gpu.sh").read_text(), re.MULTILINE))
    script = f"{find}\nprintf '%s\\n' \"${{files[@]}}\""
    chosen = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    marking = [path for path in (ROOT / "tests").rglob("*.py") if re.search(r"\bmark\.gpu\b", path.read_text())]
    found = {path for path in marking if path.name.startswith("test_")}
    found |= {test for path in marking if path.name == "conftest.py" for test in path.parent.rglob("test_*.py")}
    assert found and {str(path.relative_to(ROOT)) for path in found} <= set(chosen)
    assert len(chosen) == len(set(chosen))
    assert not [file for file in chosen if file.startswith("tests/dataloading")], "packages that a bare machine lacks"
