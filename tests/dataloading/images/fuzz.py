"""Damage valid images of every format and pack each: either a JPEG comes out or a CorruptImageError.

    python -m tests.dataloading.images.fuzz --count 5000 --seed 0

Anything else is a fault and is listed with the number that makes it again: another exception, a word on stderr, an
image that takes longer than `SLOW` seconds. Each image is small and the pixel limit is lowered to 1 MP, so a header of
60,000 x 60,000 px shows that it is refused before memory is taken.
"""

import argparse
import os
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import numpy as np

from eclip.dataloading.images import CorruptImageError, corrupt, encode_image
from tests.dataloading.images.pictures import valid

SLOW = 20.0
SIZES = (0, 1, 0xFF, 0x7FFF, 0xFFFF, 60_000, 0x7FFFFFFF, 0xFFFFFFFF)


def damage(data: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    """One to three faults that storage, transfers and broken writers leave in a file; `other` is another file."""
    out = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        size = max(1, len(out))
        # Half of the faults hit the header, where they change what the rest means.
        at = int(rng.integers(0, min(size, 200) if rng.random() < 0.5 else size))
        length = int(rng.integers(1, 64))
        fault = rng.integers(0, 9)
        if fault == 0:
            out[at : at + 1] = bytes([(out[at] if at < len(out) else 0) ^ 1 << int(rng.integers(0, 8))])
        elif fault == 1:
            del out[at:]
        elif fault == 2:
            out[at:at] = rng.bytes(length)
        elif fault == 3:
            del out[at : at + length]
        elif fault == 4:
            out[at:at] = out[at : at + length]
        elif fault == 5:
            out[:at] = other[:at]
        elif fault == 6:
            out[at : at + 512] = bytes(len(out[at : at + 512]))
        elif fault == 7:  # a length or a size, of either byte order
            width = int(rng.choice([2, 4]))
            value = int(rng.choice(SIZES)) % 256**width
            out[at : at + width] = value.to_bytes(width, "big" if rng.random() < 0.5 else "little")
        else:
            out[at : at + length] = rng.bytes(length)
    return bytes(out)


@contextmanager
def stderr_to(path: Path) -> Iterator[None]:
    """Catch what this process, its C libraries included, writes to stderr."""
    before = os.dup(2)
    with path.open("wb") as file:
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)


@dataclass
class Outcome:
    """What became of the damaged files."""

    packed: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    words: str = ""
    """What was written to stderr."""


def fuzz(count: int, seed: int, folder: Path, *, only: int | None = None) -> Outcome:
    """Pack `count` damaged images, or the one numbered `only`; number n of a seed is always the same file."""
    outcome, samples = Outcome(), list(valid())
    path, words = folder / "damaged", folder / "stderr"
    with mock.patch.object(corrupt, "MAX_PIXELS", 1_000_000), stderr_to(words):
        for number in range(count) if only is None else [only]:
            rng = np.random.default_rng((seed, number))
            name, data = samples[number % len(samples)]
            path.write_bytes(damage(data, samples[rng.integers(len(samples))][1], rng))
            start = time.perf_counter()
            try:
                encode_image(path)
                outcome.packed += 1
            except CorruptImageError as error:
                outcome.reasons[error.reason] += 1
            except Exception:
                outcome.faults.append(f"{number} ({name}): {traceback.format_exc()}")
            if (seconds := time.perf_counter() - start) > SLOW:
                outcome.faults.append(f"{number} ({name}): {seconds:.0f} s")
    outcome.words = words.read_text(errors="replace")
    return outcome


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=5000, help="damaged files (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the damage (default: %(default)s)")
    parser.add_argument("--only", type=int, help="the number of a fault, to see it again")
    args = parser.parse_args()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        outcome = fuzz(args.count, args.seed, Path(folder), only=args.only)
    rejected = outcome.reasons.total()
    counts = f"{outcome.packed} packed, {rejected} rejected, {len(outcome.faults)} faults"
    print(f"{counts}, {time.perf_counter() - start:.0f} s")
    for reason, number in outcome.reasons.most_common():
        print(f"  {number} x {reason}")
    for line in filter(None, (*outcome.faults, outcome.words)):
        print(line)
    return 1 if outcome.faults or outcome.words else 0


if __name__ == "__main__":
    raise SystemExit(main())
