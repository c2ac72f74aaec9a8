"""Memory of a step against the batch, with and without micro-batches: a table and a plot.

    python -m benchmarks.train_step.memory                                   # the demo's model, on the CPU, two minutes
    python -m benchmarks.train_step.memory --batches 16 32 --micro-batch 8 --out /tmp

Counted, not estimated from the process: every allocation and release of PyTorch's CPU allocator during a step, as its
profiler reports them. The peak is that of the bytes in use above those before the step (weights, momentum model,
optimizer and batch), so it is the same on a busy machine, and what the operating system keeps does not enter. It sees
the temporaries inside our ops; not those of libraries with an allocator of their own (oneDNN's scratch).
"""

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.harness.machine import versions
from benchmarks.train_step.batches import make_parts
from benchmarks.train_step.steps import OurStep
from eclip.config import RunConfig
from eclip.presets import PRESETS

BATCHES = (16, 32, 64, 128, 256, 512)
MICRO_BATCH = 16


class Point(NamedTuple):
    """One step's memory."""

    batch: int
    micro_batch: int | None
    peak: int
    """Bytes above what lay there before the step."""
    batch_bytes: int
    """Of the batch itself, which lies there all along."""


def peak_bytes(call: Callable[[], Any]) -> int:
    """By how much the CPU allocator's bytes in use exceeded, at most, those at the start of `call`."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        call()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        found.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_bytes())["traceEvents"]
    return _peak(event["args"] for event in events if event.get("name") == "[memory]")


def _peak(events: Iterable[dict[str, Any]]) -> int:
    """Of allocations and releases (negative `Bytes`), in the order of `Ev Idx`."""
    held = most = 0
    for event in sorted(events, key=lambda args: int(args["Ev Idx"])):
        if event["Device Type"] == 0:
            held += event["Bytes"]
            most = max(most, held)
    return most


def measure(config: RunConfig, batch: int, micro_batch: int | None) -> Point:
    """The second step's memory: the first makes the optimizer's state."""
    if micro_batch is not None and micro_batch >= batch:
        micro_batch = None
    cpu = torch.device("cpu")
    config = dataclasses.replace(config, global_batch_size=batch, micro_batch=micro_batch)
    step, parts = OurStep(config, cpu), make_parts(config, cpu)
    step(parts)
    size = sum(x.nbytes for part in parts for x in vars(part.batch).values() if isinstance(x, torch.Tensor))
    return Point(batch, micro_batch, peak_bytes(lambda: step(parts)), size)


def slope(points: list[Point]) -> float:
    """Bytes a product between the smallest and the largest batch."""
    first, last = min(points), max(points)
    return (last.peak - first.peak) / (last.batch - first.batch)


def page(whole: list[Point], split: list[Point], machine: dict[str, str], command: str, plot: str) -> str:
    """The results as Markdown."""
    micro = next(point.micro_batch for point in reversed(split))
    lines = [
        f"# Memory of a step against its batch, {machine['date']}",
        "",
        f"The demo preset's step on a CPU in float32, torch {machine['torch']}, commit {machine['commit']}: the peak",
        "of the allocator's bytes above weights, momentum model, optimizer state and batch. The profiler counts",
        f"them, so they are the same on every run, and on a busy machine. Made by `{command}`.",
        "",
        f"![peak against batch]({plot})",
        "",
        f"| products of a step | whole | micro-batch {micro} | of the whole | the batch itself |",
        "|---|---|---|---|---|",
    ]
    for one, other in zip(whole, split, strict=True):
        share = f"{other.peak / one.peak:.0%}"
        lines.append(f"| {one.batch} | {_mb(one.peak)} | {_mb(other.peak)} | {share} | {_mb(one.batch_bytes)} |")
    grows, stays = slope(whole), slope(split[-2:])
    lines += [
        "",
        f"A product more costs {grows / 1e6:.2f} MB in a whole batch: what is saved for its backward pass. With",
        f"`--micro-batch {micro}` it costs {stays / 1e6:.3f} MB over the last doubling, {stays / grows:.1%} of that.",
        "What the curve rises by before: from the second part on the gradients of the parts before lie there, and of",
        "more parts the largest has longer titles.",
    ]
    return "\n".join(lines) + "\n"


def _mb(count: int) -> str:
    return f"{count / 1e6:.0f} MB"


def draw(whole: list[Point], split: list[Point], path: Path) -> None:
    """Peak against batch, both axes doubling."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    micro = next(point.micro_batch for point in reversed(split))
    figure, axes = pyplot.subplots(figsize=(6.4, 4.0), dpi=130)
    for points, name, colour in ((whole, "whole batch", "#b3442c"), (split, f"micro-batch {micro}", "#1f6f8b")):
        axes.plot([p.batch for p in points], [p.peak / 1e6 for p in points], "o-", label=name, color=colour)
        axes.annotate(
            f"{points[-1].peak / 1e6:.0f} MB", (points[-1].batch, points[-1].peak / 1e6), xytext=(-6, 7),
            textcoords="offset points", ha="right", color=colour,
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    batches = [p.batch for p in whole]
    axes.set_xticks(batches, [str(b) for b in batches])
    axes.margins(y=0.12)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("products of a step")
    axes.set_ylabel("peak above weights and batch, MB")
    axes.set_title("demo preset, float32, CPU")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--micro-batch", type=int, default=MICRO_BATCH)
    parser.add_argument("--preset", choices=("demo", "debug"), default="demo")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder to write to")
    args = parser.parse_args()
    whole, split = [], []
    for batch in sorted(args.batches):
        whole.append(measure(PRESETS[args.preset], batch, None))
        split.append(measure(PRESETS[args.preset], batch, args.micro_batch))
        print(f"{batch}: whole {_mb(whole[-1].peak)}, micro-batch {_mb(split[-1].peak)}", flush=True)
    machine = versions()
    name = f"train_step_memory_{machine['date']}"
    args.out.mkdir(parents=True, exist_ok=True)
    draw(whole, split, args.out / f"{name}.png")
    text = page(whole, split, machine, "python -m benchmarks.train_step.memory", f"{name}.png")
    (args.out / f"{name}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
