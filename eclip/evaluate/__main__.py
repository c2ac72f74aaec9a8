"""`python -m eclip.evaluate --checkpoint RUN`: tables on stdout, RUN/evaluation.json, RUN/grounding.png."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

from eclip.evaluate.run import evaluate_run


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Evaluate a trained run on a split that training has not seen: classification, retrieval, grounding."""

    checkpoint: Path
    """Folder of the run, as training wrote it (--run-dir)."""
    split: str = "test"
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes a GPU when there is one."""
    batch_size: int = 64
    """Images at a time."""
    limit: int | None = None
    """Only so many products, evenly spread: a quick look."""
    threshold: float | Literal["auto"] = "auto"
    """Cut of the normalised score maps in [0, 1]; auto chooses on the val split."""
    cache_dir: Path | None = None
    """With a locked image tower: keep its outputs here, so that the next evaluation need not compute them. A run that
    was trained with --cache-features keeps them beside the shards anyway."""
    quiet: bool = False
    """No progress bars."""


def main() -> None:
    arguments = tyro.cli(Arguments, prog="python -m eclip.evaluate")
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        evaluate_run(
            arguments.checkpoint,
            device,
            split=arguments.split,
            batch_size=arguments.batch_size,
            limit=arguments.limit,
            threshold=arguments.threshold,
            cache_dir=arguments.cache_dir,
            progress=not arguments.quiet,
        )
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
