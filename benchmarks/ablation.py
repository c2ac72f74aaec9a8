"""The README's table: ECLIP against the CLIP objective, and what each proxy task adds, over several seeds.

    python -m benchmarks.ablation --seeds 3 --jobs 2 --out runs/ablation

Four objectives (none: L_itc alone, the CLIP baseline; inter; intra; both: ECLIP) times the seeds, each trained with the
same preset, steps and batches and evaluated on the test split by the program that users run. Runs that are complete
are not repeated. Prints, and writes to OUT/ablation.md, mean and sample standard deviation over the seeds.
"""

import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import tyro
from tqdm import tqdm

OBJECTIVES: dict[str, list[str]] = {
    "none (CLIP)": ["--objective", "clip"],
    "inter": ["--intra-weight", "0"],
    "intra": ["--inter-weight", "0", "--itm-weight", "0"],
    "both (ECLIP)": [],
}
IMAGE = {"instance": "instance (image)", "global": "global (image)"}
TITLE = {"instance": "instance (image+text)"}
SUM = {"instance": "instance + text", "global": "global (image+text)"}
MAP = {"instance": "instance", "global": "global"}
METRICS = {
    "product mAP@1, image": ("product_retrieval", "mAP@1", IMAGE),
    "product mAP@10, image": ("product_retrieval", "mAP@10", IMAGE),
    "product mAP@1, prompted by title": ("product_retrieval", "mAP@1", TITLE),
    "product mAP@1, sum with title": ("product_retrieval", "mAP@1", SUM),
    "category mAP@1, image": ("product_retrieval_coarse", "mAP@1", IMAGE),
    "grounding, region Acc@0.5": ("grounding", "region Acc@0.5", MAP),
    "grounding, ranked Acc@0.5": ("grounding", "ranked Acc@0.5", MAP),
    "grounding, pointing": ("grounding", "point", MAP),
}
"""Title of the line -> task, metric, and which rows of the task's table are its instance and global figures."""
BASELINES = {
    "product_retrieval": ["chance"],
    "product_retrieval_coarse": ["chance"],
    "grounding": ["random", "centre prior"],
}


@dataclass(frozen=True)
class Arguments:
    """Train and evaluate every objective with every seed, then print the table of means."""

    seeds: int = 3
    """Seeds 0 .. seeds-1."""
    jobs: int = 1
    """Runs at the same time; the cores are divided among them."""
    out: Path = Path("runs/ablation")
    preset: str = "demo_towers"
    flags: str = ""
    """Further flags of eclip.train for every run, as one string: "--steps 1200"."""


def train_run(run_dir: Path, objective: str, seed: int, arguments: Arguments) -> Path:
    """One run and its evaluation in a process of its own. Returns evaluation.json; RuntimeError names the log."""
    result = run_dir / "evaluation.json"
    if result.exists():
        return result
    run_dir.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        "-m",
        "eclip.train",
        "--preset",
        arguments.preset,
        "--run-dir",
        str(run_dir),
        "--overwrite",
    ]
    command += ["--seed", str(seed), "--log-every", "50", "--checkpoint-every", "100000"]
    command += [*OBJECTIVES[objective], *arguments.flags.split()]
    threads = max(1, len(os.sched_getaffinity(0)) // arguments.jobs)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with open(run_dir / "log.txt", "w") as log:
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment, check=False).returncode
    if code:
        raise RuntimeError(f"{objective}, seed {seed}: eclip.train ended with status {code}; see {run_dir / 'log.txt'}")
    return result


def collect(results: dict[str, list[Path]]) -> list[str]:
    """Markdown lines: a row for each metric, columns by objective; instance / global where a run has both."""
    tables = {name: [json.loads(path.read_text())["tables"] for path in paths] for name, paths in results.items()}
    lines = ["| | " + " | ".join(tables) + " | without training |", "|---" * (len(tables) + 2) + "|"]
    for title, (task, metric, rows) in METRICS.items():
        for kind, row in rows.items():
            cells = [
                _mean([t[task]["rows"][row][metric] for t in runs if row in t[task]["rows"]])
                for runs in tables.values()
            ]
            first = next(iter(tables.values()))[0][task]["rows"]
            baselines = ", ".join(f"{b} {100 * first[b][metric]:.1f}" for b in BASELINES[task])
            lines.append(f"| {title}: {kind} | " + " | ".join(cells) + f" | {baselines} |")
    texts = [_mean([t["product_retrieval"]["rows"]["text only"]["mAP@1"] for t in runs]) for runs in tables.values()]
    lines.append("| product mAP@1: titles alone | " + " | ".join(texts) + " | |")
    return lines


def _mean(values: list[float]) -> str:
    if not values:
        return "-"
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{spread}"


def main(arguments: Arguments) -> None:
    jobs = [(objective, seed) for seed in range(arguments.seeds) for objective in OBJECTIVES]
    if arguments.jobs < 1 or arguments.seeds < 1:
        raise SystemExit(f"--jobs {arguments.jobs} --seeds {arguments.seeds}: at least one of each")

    def run(job: tuple[str, int]) -> Path:
        return train_run(arguments.out / f"{job[0].split()[0]}_{job[1]}", *job, arguments)

    # The first run alone: it packs the catalogue and fills the feature cache that the others read.
    paths = [run(jobs[0])]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        paths += tqdm(pool.map(run, jobs[1:]), desc="runs", total=len(jobs), initial=1)
    results: dict[str, list[Path]] = {}
    for (objective, _), path in zip(jobs, paths, strict=True):
        results.setdefault(objective, []).append(path)
    page = "\n".join(collect(results)) + "\n"
    (arguments.out / "ablation.md").write_text(page)
    print(f"\n{arguments.preset}, {arguments.seeds} seeds, test split, % (mean ± standard deviation)\n\n{page}")


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
