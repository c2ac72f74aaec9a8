"""A small array to fill, without torch: what processes of test_file.py start with."""

from pathlib import Path

import numpy as np

from eclip.training.feature_cache.file import Filling

ITEMS, WIDTH, BATCH = 50, 3, 4
EXPECTED = np.arange(ITEMS, dtype=np.float16)[:, None] + np.arange(1, WIDTH + 1, dtype=np.float16) / 8


class Recorder:
    """A `compute` that remembers what it was asked for; item 7 has a note."""

    def __init__(self) -> None:
        self.computed: list[int] = []

    def __call__(self, first: int, last: int) -> tuple[np.ndarray, dict[int, str]]:
        assert first % BATCH == 0 and last - first == min(BATCH, ITEMS - first)
        self.computed += range(first, last)
        rows = np.arange(first, last, dtype=np.float16)[:, None] + np.arange(1, WIDTH + 1, dtype=np.float16) / 8
        return rows, {i: "line\u2028 one\ntwo" for i in range(first, last) if i == 7}


def filling(folder: Path, compute: object, **changes: object) -> Filling:
    fields = {"path": folder / "x.npy", "shape": (ITEMS, WIDTH), "compute": compute, "batch": BATCH, "progress": False}
    return Filling(**(fields | changes))  # type: ignore[arg-type]
