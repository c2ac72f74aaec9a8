"""The training loss with the residual stream in bfloat16 beside that in float32, on a CPU: a table.

    OMP_NUM_THREADS=1 python -m benchmarks.residual_curve --out benchmarks/results    # six minutes on a busy machine

Four runs of the same steps and batches: float32 throughout; bfloat16 autocast, which training uses on GPUs and a CPU is
made to use here, with the stream in float32 and in bfloat16; and, to tell what differences mean, float32 from another
seed's weights and batches. The model is small and the catalogue the debug preset's: only whether curves part is told.
"""

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from unittest import mock

import torch

from benchmarks.harness.machine import versions
from eclip.config import RunConfig
from eclip.model.residual import set_residual_dtype
from eclip.model.settings import ModelConfig
from eclip.parallel.ranks import Ranks
from eclip.presets import PRESETS
from eclip.train import train
from eclip.training.step import TrainStep

SMALL = ModelConfig(
    image_size=48, patch_size=8, vision_width=96, vision_depth=6, vision_heads=3,
    vocab_size=512, text_width=96, text_depth=4, text_heads=3,
    embed_dim=96, num_queries=8, decoder_depth=3, decoder_heads=6,
)  # fmt: skip
RUNS: dict[str, tuple[bool, torch.dtype | None, int]] = {
    "float32": (False, None, 0),
    "autocast, stream float32": (True, None, 0),
    "autocast, stream bfloat16": (True, torch.bfloat16, 0),
    "float32, another seed": (False, None, 1),
}
"""Name -> autocast, the stream's dtype under it, seed."""


def losses(config: RunConfig, autocast: bool, stream: torch.dtype | None) -> list[float]:
    """The loss of every step of a run."""
    found: list[float] = []

    def note(step: int, values: Mapping[str, float]) -> None:
        found.append(values["loss"])

    def forced(step: TrainStep) -> AbstractContextManager[object]:
        set_residual_dtype(step, stream)
        return torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()

    alone = Ranks(rank=0, world_size=1, device=torch.device("cpu"), mesh=None)
    with mock.patch.object(TrainStep, "autocast", forced):
        assert train(config, alone, sinks=[note])
    return found


def page(curves: Mapping[str, list[float]], window: int, minutes: float, batch: int) -> str:
    """The table as Markdown: means over windows of steps."""
    steps = len(next(iter(curves.values())))
    rows = [
        f"| {start + 1}-{min(start + window, steps)} | "
        + " | ".join(f"{statistics.fmean(curve[start : start + window]):.4f}" for curve in curves.values())
        + " |"
        for start in range(0, steps, window)
    ]
    exact = curves["float32"]
    differences = [
        f"{statistics.fmean(abs(a - b) for a, b in zip(exact, curve, strict=True)):.4f}" for curve in curves.values()
    ]
    machine = ", ".join(f"{name} {value}" for name, value in versions().items())
    return "\n".join(
        [
            "# The residual stream in bfloat16: loss curves",
            "",
            f"{machine}; {minutes:.0f} minutes.",
            "",
            "Made by `python -m benchmarks.residual_curve`: the debug preset's catalogue, objective and learning",
            f"rate, a model of 6 + 4 + 3 blocks 96 wide, batches of {batch}, bfloat16 autocast forced on a CPU;",
            f"nothing ran on a GPU. Mean loss of {window} steps; in the last line the mean |difference| of a step's",
            "loss from float32's.",
            "",
            f"| steps | {' | '.join(curves)} |",
            f"|---|{'---|' * len(curves)}",
            *rows,
            f"| from float32 | {' | '.join(differences)} |",
            "",
        ]
    )


def main() -> None:
    """Train the four, print the table, and write it to --out."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=28)
    parser.add_argument("--window", type=int, default=20)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    curves, start = {}, time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        debug = PRESETS["debug"]
        for number, (name, (autocast, stream, seed)) in enumerate(RUNS.items()):
            config = dataclasses.replace(
                debug,
                model=SMALL,
                optim=dataclasses.replace(debug.optim, warmup_steps=arguments.steps // 10),
                run_dir=Path(folder, str(number)),
                steps=arguments.steps,
                global_batch_size=arguments.batch,
                checkpoint_every=arguments.steps,
                seed=seed,
            )
            curves[name] = losses(config, autocast, stream)
    text = page(curves, arguments.window, (time.perf_counter() - start) / 60, arguments.batch)
    print(text)
    if arguments.out is not None:
        (arguments.out / "residual_curve.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
