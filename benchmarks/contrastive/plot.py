"""Plot time and peak memory of the contrastive loss against the batch, one line a provider, both axes logarithmic.

    python -m benchmarks.contrastive.plot benchmarks/results/X.json --out X.png

Reads what benchmarks.report wrote, which also calls this. From a CPU, whose shapes are small, the plot shows that it
can be made, and its title says so; memory is measured on GPUs alone.
"""

import argparse
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.contrastive.goals import BOTH
from benchmarks.harness.goals import Row

STYLES = {
    "ours": ("black", "o"),
    "eager": ("tab:red", "s"),
    "compile": ("tab:pink", "D"),
    "reference": ("tab:gray", "x"),
    "cublas blocks": ("tab:blue", "^"),
    "open_clip": ("tab:orange", "v"),
    "memeff": ("tab:green", "<"),
    "inf-cl": ("tab:olive", ">"),
    "cut-cross-entropy": ("tab:purple", "P"),
    "liger": ("tab:brown", "*"),
    "quack": ("tab:cyan", "h"),
}
"""Colour and marker of a provider, the same in every plot."""


def lines(rows: Iterable[Row]) -> dict[str, list[tuple[int, Row]]]:
    """Provider -> (batch, row), ascending, of forward and backward at scale 50 with the fewest features measured."""
    found: dict[int, dict[str, list[tuple[int, Row]]]] = {}
    for row in rows:
        shape = re.fullmatch(r"B=(\d+) D=(\d+)", row.get("shape", ""))
        if row.get("op") == BOTH and shape:
            batch, dim = map(int, shape.groups())
            found.setdefault(dim, {}).setdefault(row["provider"], []).append((batch, row))
    of_dim = found[min(found)] if found else {}
    return {name: sorted(points, key=lambda point: point[0]) for name, points in of_dim.items()}


def short(batch: int) -> str:
    """4096 as 4k, 2**20 as 1M."""
    for power, unit in ((2**20, "M"), (2**10, "k")):
        if batch >= power:
            return f"{batch // power}{unit}"
    return str(batch)


def draw(rows: Iterable[Row], machine: dict[str, Any], path: Path) -> bool:
    """Write the plot to `path`; False where no row belongs into it. Raises ImportError without matplotlib."""
    providers = lines(rows)
    if not providers:
        return False
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.use("Agg")
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    time, memory = figure.subplots(1, 2, sharex=True)
    for name in sorted(providers, key=list(STYLES).index):
        colour, marker = STYLES[name]
        style: dict[str, Any] = {"color": colour, "marker": marker, "label": name}
        style |= {"linewidth": 2.5, "zorder": 3} if name == "ours" else {"linewidth": 1.2}
        batches, points = zip(*providers[name], strict=True)
        time.plot(batches, [row["seconds"] * 1e3 for row in points], **style)
        if all("peak_bytes" in row for row in points):
            memory.plot(batches, [row["peak_bytes"] / 1e9 for row in points], **style)
    ticks = sorted({batch for points in providers.values() for batch, _ in points})
    for axes, what in ((time, "forward + backward, ms"), (memory, "peak memory above the inputs, GB")):
        axes.set(xscale="log", yscale="log", xlabel="pairs in the batch", ylabel=what)
        axes.set_xticks(ticks, [short(tick) for tick in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    if not memory.lines:
        memory.set_yticks([])
        memory.text(0.5, 0.5, "measured on GPUs alone", transform=memory.transAxes, ha="center")
    time.legend(fontsize=8)
    (example, *_) = next(iter(providers.values()))
    dtype, dim = example[1].get("dtype", ""), example[1]["shape"].rpartition("=")[2]
    title = f"Contrastive loss, D={dim}, {dtype}, {machine.get('device')}, torch {machine.get('torch')}"
    if machine.get("device") == "cpu":
        title += "\nCPU, small batches: shows that it runs, and nothing about speed"
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=130)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("results", type=Path, help="JSON file written by benchmarks.report")
    parser.add_argument("--out", type=Path, required=True, help="PNG file to write")
    args = parser.parse_args()
    record = json.loads(args.results.read_text())
    if not draw(record["rows"], record["machine"], args.out):
        raise SystemExit(f"{args.results} holds no row of {BOTH}")


if __name__ == "__main__":
    main()
