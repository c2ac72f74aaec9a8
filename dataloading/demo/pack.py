"""The embedded catalogue: 172 real products (CC0) composed into train, val and test shards.

    python -m eclip.dataloading.demo --out data/demo

Processes compose a product each (samples.py says what); the shards do not depend on how many they are. A folder that
is up to date is left as it is: its record holds a fingerprint of all that decides what is composed.
"""

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from tqdm import tqdm

from .. import schema
from ..packing import (
    Sample,
    own,
    refuse_foreign,
    replace_shards,
    require_finished,
    shard_writer,
    write_record,
    write_tars,
)
from ..system.command import Parser, one_line_errors
from ..system.console import progress_bar, say
from ..system.parent import die_with_parent
from .products import ARCHIVE
from .samples import Plan, compose_product, make_plan
from .scenes import DISTRACTORS
from .split import SPLITS

_RECORD = "demo.json"
_plan: Plan | None = None


def _start_worker(plan: Plan) -> None:
    global _plan
    for number in (signal.SIGINT, signal.SIGHUP):  # these reach the whole group; the parent ends the pool
        signal.signal(number, signal.SIG_IGN)
    die_with_parent()
    _plan = plan


def _work(p: int) -> Sample:
    assert _plan is not None
    return compose_product(_plan, p)


def fingerprint(
    image_size: int, seed: int, images_per_product: int, distractors: tuple[int, int], limit: int | None
) -> str:
    """Hash of the arguments, the archive and the code that composes: equal fingerprints, equal shards."""
    sha = hashlib.sha256(repr((image_size, seed, images_per_product, tuple(distractors), limit)).encode())
    sha.update(ARCHIVE.read_bytes())
    for source in (*sorted(Path(__file__).parent.glob("*.py")), Path(schema.__file__), Path(shard_writer.__file__)):
        sha.update(source.read_bytes())
    return sha.hexdigest()[:16]


def _up_to_date(data_dir: Path, expected: str) -> bool:
    try:
        record = json.loads((data_dir / _RECORD).read_text(encoding="utf-8"))
        if record["fingerprint"] != expected:
            return False
        require_finished(data_dir)
        return all((data_dir / name).stat().st_size == size for name, size in record["files"].items())
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False


def _validate(
    image_size: int, seed: int, images_per_product: int, distractors: tuple[int, int], limit: int | None, workers: int
) -> None:
    if not 32 <= image_size <= 512:
        raise ValueError(f"image_size={image_size} is out of range: the views have 192 px; choose 32 to 512")
    if images_per_product < 2:
        raise ValueError(
            f"images_per_product={images_per_product}: pairs need images of two sources; choose at least 2"
        )
    if not 0 <= distractors[0] <= distractors[1] <= 6:
        raise ValueError(f"distractors={distractors}: expected two numbers, 0 <= low <= high <= 6")
    if limit is not None and limit < 20:
        raise ValueError(f"limit={limit}: fewer than 20 products leave a split without distractors")
    if seed < 0:
        raise ValueError(f"seed={seed}: choose at least 0")
    if workers < 1:
        raise ValueError(f"workers={workers}: choose at least 1")


def pack_demo(
    data_dir: Path,
    *,
    image_size: int = 160,
    seed: int = 0,
    images_per_product: int = 40,
    distractors: tuple[int, int] = DISTRACTORS,
    limit: int | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> None:
    """Write train, val and test shards of the embedded catalogue unless they are there already.

    image_size: side of the square JPEGs, pixels. images_per_product: spread over SKUs and sources; SKUs that would get
    fewer than two are left out. distractors: least and most other products in a customer photo. limit: only so many
    products of the catalogue, evenly spaced (for tests). workers: processes, by default one a core; the shards do not
    depend on their number. Like every program that starts processes, a script calling this with more than one worker
    needs an `if __name__ == "__main__":` guard. Waits while another packing is at work there; shards that it replaces
    stay until the new ones are complete. Raises ValueError for settings out of range, for a folder that cannot be
    written or holds tars of another origin, also a packed catalogue of one's own, and when the disk is full.
    """
    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    _validate(image_size, seed, images_per_product, distractors, limit, workers)
    expected = fingerprint(image_size, seed, images_per_product, distractors, limit)
    if _up_to_date(data_dir, expected):
        return
    plan = make_plan(image_size, seed, images_per_product, distractors, limit)
    with own(data_dir, wait=True):
        if not _up_to_date(data_dir, expected):  # another run may have packed while this one waited
            refuse_foreign(data_dir, (_RECORD,))  # a user's own catalogue is not replaced by this one
            _pack(data_dir, plan, expected, workers, progress)


def _pack(data_dir: Path, plan: Plan, expected: str, workers: int, progress: bool) -> None:
    total = plan.images_per_product * len(plan.products)
    with replace_shards(data_dir) as folder:
        with (
            _workers(workers, plan) as compose_all,
            progress_bar(total, unit="img", desc="composing", disable=not progress) as bar,
        ):
            for split in SPLITS:
                positions = [p for p, side in enumerate(plan.sides) if side == split]
                write_tars(_counted(compose_all(positions), bar), folder, split)
        facts = {
            "fingerprint": expected,
            "image_size": plan.image_size,
            "seed": plan.seed,
            "images_per_product": plan.images_per_product,
            "distractors": list(plan.distractors),
            "products": {split: plan.sides.count(split) for split in SPLITS},
        }
        write_record(folder, _RECORD, facts)


def _counted(samples: Iterable[Sample], bar: "tqdm[None]") -> Iterator[Sample]:
    for product, images in samples:
        bar.update(len(images))
        yield product, images


@contextlib.contextmanager
def _workers(workers: int, plan: Plan) -> Iterator[Callable[[list[int]], Iterable[Sample]]]:
    """Yield a function that composes products in order, here or in `workers` processes."""
    if workers == 1:
        yield lambda positions: (compose_product(plan, p) for p in positions)
        return
    # spawn: torch may already run threads here, and a forked copy of those can hang.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(plan,))
    try:
        yield lambda positions: pool.map(_work, positions)
    except BrokenProcessPool as error:
        raise ValueError(
            f"one of {workers} composing processes was killed (the machine's memory may be full); try fewer workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def main(argv: Sequence[str] | None = None, *, prog: str = "python -m eclip.dataloading.demo") -> None:
    """Command line of `pack_demo`."""
    parser = Parser(
        prog=prog,
        description="Write the embedded catalogue (172 CC0 products) as train, val and test shards.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("data/demo"), help="folder of the shards")
    add("--image-size", type=int, default=160, help="side of the images, pixels")
    add("--seed", type=int, default=0, help="seed of scenes and titles; the split is fixed")
    add("--images-per-product", type=int, default=40, help="images of each product")
    add("--distractors", type=int, nargs=2, default=DISTRACTORS, help="least and most products beside the titled one")
    add("--limit", type=int, help="only so many products")
    add("--workers", type=int, help="processes, one a core when not given")
    add("--no-progress", action="store_true", help="no progress bar")
    args = parser.parse_args(argv)
    with one_line_errors(parser.prog):
        pack_demo(
            args.out,
            image_size=args.image_size,
            seed=args.seed,
            images_per_product=args.images_per_product,
            distractors=tuple(args.distractors),
            limit=args.limit,
            workers=args.workers,
            progress=not args.no_progress,
        )
        record = json.loads((args.out / _RECORD).read_text(encoding="utf-8"))
        counts = ", ".join(f"{split} {n}" for split, n in record["products"].items())
        say(f"{args.out}: products {counts}; {sum(record['files'].values()) / 2**20:.0f} MiB of shards")
