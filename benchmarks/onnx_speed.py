"""How fast an export's ONNX graphs are: `python -m benchmarks.onnx_speed --export FOLDER`, of one with --onnx --int8.

Each graph in float32 and in int8 by onnxruntime, in turns, on one thread: images of noise, texts of 12 tokens. What
int8 gains depends on the CPU. Prints Markdown.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness.machine import versions
from benchmarks.harness.race import Race

TOKENS = 12
Feed = dict[str, Any]


def open_graph(path: Path) -> Any:
    """An onnxruntime session of one thread."""
    from onnxruntime import InferenceSession, SessionOptions

    options = SessionOptions()
    options.intra_op_num_threads = 1
    return InferenceSession(path, options, providers=["CPUExecutionProvider"])


def feeds(folder: Path, batch: int) -> dict[str, Feed]:
    """Inputs by graph; the decoder's are what the image graph gives."""
    draw = np.random.default_rng(0)
    image = open_graph(folder / "image.onnx")
    (pixels,) = image.get_inputs()
    images = {"images": draw.integers(0, 256, (batch, *pixels.shape[1:]), dtype=np.uint8)}
    embedding, tokens = image.run(None, images)
    ids = draw.integers(5, 100, (batch, TOKENS))
    return {
        "image": images,
        "text": {"input_ids": ids, "attention_mask": np.ones_like(ids)},
        "decoder": {"tokens": tokens, "prompt": embedding, "modality": np.ones(batch, np.int64)},
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """A table for the terminal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--export", type=Path, required=True, help="folder of eclip export --onnx --int8")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args(arguments)
    folder = args.export / "onnx"
    if not (folder / "image.int8.onnx").is_file():
        parser.error(f"--export {args.export}: no onnx/image.int8.onnx there; eclip export --onnx --int8 writes it")
    print(", ".join(f"{name} {value}" for name, value in versions().items()))
    print(f"\n| graph, batch {args.batch} | float32, ms each | int8, ms each | times as fast |\n|---|---|---|---|")
    for name, feed in feeds(folder, args.batch).items():
        if not (folder / f"{name}.onnx").is_file():
            continue  # a model without a decoder
        kinds = {kind: open_graph(folder / f"{name}{kind}.onnx") for kind in ("", ".int8")}
        race = Race({kind: partial(session.run, None, feed) for kind, session in kinds.items()})
        race.turn()
        race.forget()
        for _ in range(args.rounds):
            race.turn()
        exact, rounded = race.rows()
        each = [1000 * row["seconds"] / args.batch for row in (exact, rounded)]
        print(f"| {name} | {each[0]:.2f} | {each[1]:.2f} | {1 / rounded['of_first']:.2f} |", flush=True)


if __name__ == "__main__":
    main()
