"""`python -m eclip.evaluate --checkpoint RUN`: tables on stdout, RUN/evaluation.json, RUN/grounding.png."""

import io
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

from eclip.evaluate.run import evaluate_run
from eclip.presets import one_line_errors
from eclip.training.checkpoint import Weights


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Evaluate a trained run on a split that training has not seen: classification, retrieval, grounding."""

    checkpoint: Path
    """Folder of the run, as training wrote it (--run-dir)."""
    best: bool = False
    """Take the checkpoint with the lowest loss of the val split (train --validate-every N) instead of the newest."""
    weights: Weights = "model"
    """The trained weights, or the moving average (EMA) of them that the momentum model is."""
    data_dir: Path | None = None
    """The catalogue, where it is not the one at the place that the run recorded: moved, or another one."""
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
    decode_queries: int = 0
    """Also rerank 50 candidates each for so many queries with instances decoded for the question: slow, 50 decodings a
    query and table. Without it the matching head sees stored vectors alone."""
    quiet: bool = False
    """No progress bars."""


def main(argv: Sequence[str] | None = None, *, prog: str = "python -m eclip.evaluate") -> None:
    with one_line_errors():
        arguments = tyro.cli(Arguments, prog=prog, args=argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # keys and titles may hold what the terminal has not
    try:
        evaluate_run(
            arguments.checkpoint,
            arguments.device,
            data_dir=arguments.data_dir,
            split=arguments.split,
            batch_size=arguments.batch_size,
            limit=arguments.limit,
            threshold=arguments.threshold,
            cache_dir=arguments.cache_dir,
            decode_queries=arguments.decode_queries,
            progress=not arguments.quiet,
            which="best" if arguments.best else "newest",
            weights=arguments.weights,
        )
    except torch.OutOfMemoryError:
        sys.exit(f"error: --batch-size {arguments.batch_size}: the GPU's memory does not suffice; take a smaller one")
    except KeyboardInterrupt:
        print(
            "error: stopped (Ctrl-C); files are written last, an earlier evaluation's are as they were", file=sys.stderr
        )
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError) as error:
        sys.exit("error: " + " ".join(str(error).split()))


if __name__ == "__main__":
    main()
