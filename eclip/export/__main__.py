"""`python -m eclip.export --checkpoint RUN --out FOLDER`: the run's model as a folder for others."""

import io
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from eclip.export.run import Wanted, export_run
from eclip.presets import one_line_errors
from eclip.training.checkpoint import Weights


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Export a trained run: one folder with weights, settings, tokenizer and a model card, which `eclip.load` and
    `eclip train --start-from` open; its towers as transformers loads them; ONNX and int8 weights if wanted."""

    checkpoint: Path
    """Folder of the run, as training wrote it (--run-dir)."""
    out: Path
    """Folder to write. It appears whole, or not at all."""
    overwrite: bool = False
    """Replace an earlier export in --out; what no export wrote is never deleted."""
    best: bool = False
    """Take the checkpoint with the lowest loss of the val split (train --validate-every N) instead of the newest."""
    weights: Weights = "model"
    """The trained weights, or the moving average (EMA) of them that the momentum model is."""
    name: str | None = None
    """The model's name on the card; without it the run folder's."""
    licence: str | None = None
    """Of the weights, by its SPDX name (apache-2.0, cc-by-4.0): for the card."""
    towers: bool = True
    """The two towers as folders that transformers loads."""
    onnx: bool = False
    """ONNX files of image tower, text tower and decoder, compared with PyTorch by onnxruntime."""
    int8: bool = False
    """Store matrices in int8, a fourth of the size; what that costs in product retrieval is measured and printed. With
    --onnx also files with int8 weights, which CPUs run faster."""
    measure: bool = True
    """With --int8: measure it on the run's test split (two passes over its images)."""
    data_dir: Path | None = None
    """The catalogue to measure on, where it is not the one at the place that the run recorded."""
    limit: int | None = None
    """Measure on only so many products, evenly spread."""
    batch_size: int = 64
    """Images at a time, while measuring."""
    device: str = "auto"
    """Measure on cpu, cuda, cuda:1, ...; auto takes a GPU when there is one."""
    quiet: bool = False
    """No progress bars."""


    def __post_init__(self) -> None:
        if not (self.int8 and self.measure):
            given = {"--data-dir": self.data_dir, "--limit": self.limit}
            for name in (name for name, value in given.items() if value is not None):
                raise ValueError(f"{name} is of what --int8 costs, which is not measured here: leave it out")
        if not (self.int8 or self.measure):
            raise ValueError("--no-measure leaves out what --int8 costs, and there is no --int8: leave one out")


def main(argv: Sequence[str] | None = None, *, prog: str = "python -m eclip.export") -> None:
    """Export and print what is there; exits with 2 for flags that mean nothing, with 1 for what cannot be exported."""
    with one_line_errors():
        arguments = tyro.cli(Arguments, prog=prog, args=argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        export_run(arguments.checkpoint, arguments.out, _wanted(arguments))
    except KeyboardInterrupt:
        print(f"error: stopped; nothing is left of the export, {arguments.out} is as it was", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError) as error:
        sys.exit("error: " + " ".join(str(error).split()))
    finally:
        signal.signal(signal.SIGTERM, before)


def _stop(signum: int, frame: object) -> None:
    """A stopped job cleans up as Ctrl-C does."""
    raise KeyboardInterrupt


def _wanted(arguments: Arguments) -> Wanted:
    return Wanted(
        which="best" if arguments.best else "newest",
        weights=arguments.weights,
        name=arguments.name,
        licence=arguments.licence,
        towers=arguments.towers,
        onnx=arguments.onnx,
        int8=arguments.int8,
        measure=arguments.measure,
        data_dir=arguments.data_dir,
        limit=arguments.limit,
        batch_size=arguments.batch_size,
        device=arguments.device,
        overwrite=arguments.overwrite,
        progress=not arguments.quiet,
    )


if __name__ == "__main__":
    main()
