"""How fast `eclip embed` makes rows, and what takes the time: `python -m benchmarks.search.embedding --model RUN ...`.

Every piece alone, over the same images in batches of 64, after one batch to warm up, in CPU time of the process (all
its threads), which other programs on the machine hardly change; then the whole as the command does it, decoding in
threads beside the model and writing parts, in images a second of the clock on the wall. Prints Markdown.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import eclip
from benchmarks.harness.machine import versions
from eclip.inference.encoding import IMAGE, TEXT
from eclip.search.embed import ShardCatalogue
from eclip.search.embed.encode import BATCH, Decoded, Embedder
from eclip.search.embed.parts import Parts

PIECES = (
    "read and decode JPEG, thumbnail",
    "image tower",
    "titles",
    "decoder, by the image and by the title",
    "boxes",
    "write Parquet",
)


class Clock:
    """CPU seconds by piece."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PIECES, 0.0)

    @contextmanager
    def of(self, piece: str) -> Iterator[None]:
        """Add the block's time."""
        began = time.process_time()
        yield
        self.seconds[piece] += time.process_time() - began


def pieces(embedder: Embedder, listings: list[Any], clock: Clock) -> None:
    """One batch after another, one piece after another."""
    encoder = embedder.encoder
    for start in range(0, len(listings), BATCH):
        with clock.of(PIECES[0]):
            found = [embedder.decode(listing) for listing in listings[start : start + BATCH]]
        good = [one for one in found if isinstance(one, Decoded)]
        with clock.of(PIECES[1]):
            encoded = encoder.images(torch.stack([one.square for one in good]), [one.size for one in good])
        with clock.of(PIECES[2]):
            texts = encoder.texts([one.listing.title for one in good])
        with clock.of(PIECES[3]):
            own = encoder.instances(encoded, encoded.features.cls, IMAGE)
            titled = encoder.instances(encoded, texts, TEXT)
        with clock.of(PIECES[4]):
            for i, one in enumerate(good):
                for maps in (own.maps, titled.maps):
                    embedder.box(maps[i].numpy(), one.size)


def whole(embedder: Embedder, catalogue: ShardCatalogue, count: int, folder: Path, clock: Clock) -> float:
    """Images a second of the command's own loop; the writing goes to the clock."""
    parts = Parts(folder, {}, count)
    parts.start(overwrite=False)
    began = time.perf_counter()
    for number in range(parts.count):
        rows = embedder.rows(catalogue.listings(*parts.bounds(number)), _nothing)
        with clock.of(PIECES[5]):
            parts.write(number, embedder.table(rows), rows.rejected)
    return count / (time.perf_counter() - began)


def _nothing(done: int) -> None:
    """Nobody watches."""


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--split", default="test")
    parser.add_argument("--images", type=int, default=640)
    args = parser.parse_args()
    model, catalogue = eclip.load(args.model), ShardCatalogue(args.data, [args.split])
    if not model.encoder.has_decoder:
        raise SystemExit(f"error: {args.model}: no decoder to time; take a run of --objective eclip")
    count = min(args.images, len(catalogue))
    embedder = Embedder(model, thumbnail=256, workers=2)
    pieces(embedder, list(catalogue.listings(0, BATCH)), Clock())
    clock = Clock()
    pieces(embedder, list(catalogue.listings(0, count)), clock)
    with tempfile.TemporaryDirectory() as folder:
        rate = whole(embedder, catalogue, count, Path(folder), clock)
    total = sum(clock.seconds.values())
    print(", ".join(f"{name} {value}" for name, value in versions().items()))
    print(f"\n{count} images of {args.data.name}'s {args.split} split, {model}\n")
    print("| piece | CPU ms an image | share |\n|---|---|---|")
    for piece, seconds in clock.seconds.items():
        print(f"| {piece} | {1e3 * seconds / count:.2f} | {100 * seconds / total:.0f}% |")
    print(f"| sum | {1e3 * total / count:.2f} | |\n\nThe whole, as the command does it: **{rate:.1f} images/s**")


if __name__ == "__main__":
    main()
