"""How long the training thread waits for a batch, and works for it, while steps go on.

    python -m benchmarks.dataloading.wait                                    # on an idle machine, two minutes
    python -m benchmarks.dataloading.wait --stored 32 --size 32 --step 1     # little to decode: the feeding alone

A step is a sleep, as of a thread that waits for its GPU. The first batches, which fill what is ahead, are left out.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from eclip.dataloading.demo import pack_demo
from eclip.dataloading.loader import Decoder, ProductLoader
from eclip.dataloading.shards import ShardIndex
from eclip.dataloading.text import Tokenizer

WARM = 4  # batches: more than any decoder has ahead


def waits(loader: ProductLoader, *, step: float, batches: int) -> tuple[float, float]:
    """Medians of a batch in milliseconds: the wait for it, and this thread's own CPU time in it."""
    stream = iter(loader)
    walls, works = [], []
    for _ in range(WARM + batches):
        wall, work = time.perf_counter(), time.thread_time()
        next(stream)
        walls.append(time.perf_counter() - wall)
        works.append(time.thread_time() - work)
        time.sleep(step)
    stream.close()  # type: ignore[attr-defined]
    return 1e3 * median(walls[WARM:]), 1e3 * median(works[WARM:])


def main(argv: Sequence[str] | None = None) -> None:
    """Pack some of the embedded catalogue, and print a line for each decoder."""
    parser = argparse.ArgumentParser(prog="wait", description=__doc__)
    parser.add_argument("--decoders", nargs="+", default=["dali:1", "torch:0", "torch:2"], help="NAME:WORKERS")
    parser.add_argument("--batch", type=int, default=512, help="products")
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--step", type=float, default=3.0, help="seconds; longer than a batch takes to decode")
    parser.add_argument("--stored", type=int, default=160, help="pixels of a packed image")
    parser.add_argument("--size", type=int, default=224, help="pixels of a crop")
    parser.add_argument("--products", type=int, default=24, help="of the catalogue")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        pack_demo(Path(folder), image_size=args.stored, images_per_product=6, limit=args.products, progress=False)
        index = ShardIndex.open(Path(folder), "train")
        tokenizer = Tokenizer.train(index.texts(), 512)
        print(f"{args.batch} products a batch, a step of {args.step:g} s | wait | CPU of the training thread")
        for name in args.decoders:
            decoder, _, workers = name.partition(":")
            loader = ProductLoader(
                index, tokenizer, global_batch_size=args.batch, image_size=args.size, decoder=_known(decoder),
                num_workers=int(workers or 1),
            )  # fmt: skip
            wall, work = waits(loader, step=args.step, batches=args.batches)
            print(f"{name} | {wall:.1f} ms | {work:.1f} ms", flush=True)


def _known(name: str) -> Decoder:
    known: dict[str, Decoder] = {"dali": "dali", "torch": "torch", "none": "none"}
    return known[name]


if __name__ == "__main__":
    main()
