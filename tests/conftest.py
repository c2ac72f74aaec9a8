"""Settings of every test process: one thread, the order of files, and what a machine without a GPU does instead."""

import os
from pathlib import Path

# Before torch is imported: two test processes on two cores are 10x slower with a thread pool each.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Nothing in the tests may ask a hub for weights.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

if not torch.cuda.is_available():
    # Before any @triton.jit runs: a process interprets its kernels or compiles them, never both.
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


LONG = (
    "parallel/test_train_ways.py",
    "parallel/test_checkpoints_across.py",
    "evaluate/test_together.py",
    "training/checkpoint/test_kills.py",
    "training/metrics/test_runs.py",
    "parallel/test_watch.py",
)
"""Files of half a minute to a minute each, longest first."""


def pytest_configure(config: pytest.Config) -> None:
    """Hand files to workers in our order: xdist's own starts those of few tests last, and the longest have few."""
    missing = [name for name in LONG if not (Path(__file__).parent / name).is_file()]
    assert not missing, f"LONG in tests/conftest.py names {missing}, which are not there"
    if hasattr(config.option, "loadscopereorder"):  # with xdist
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long files first, so that no worker is left with one at the end; skip tests marked `gpu` without a GPU."""
    place = {Path(__file__).parent / name: i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path, len(LONG)))  # stable
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture
def device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
