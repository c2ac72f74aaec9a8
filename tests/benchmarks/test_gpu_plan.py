"""The plan of gpu.sh: every benchmark is in it, and its parts end within nine minutes."""

import re
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
