"""A pytest plugin that runs one part of a session's tests, so that several processes share the compiling of kernels.

    python -m pytest -p benchmarks.harness.shard --shard 2/6 -m gpu tests    # every sixth test, beginning at the second

Most of such a session is Triton and torch.compile at work on one core each; pytest-xdist does the same where it is
installed. --memory-share 0.2 keeps the process to a fifth of the GPU's memory: beyond that it gets an out-of-memory
error, and its neighbours do not.
"""

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shard", default="1/1", metavar="I/N", help="run every N-th test, starting with the I-th")
    parser.addoption("--memory-share", type=float, help="share of the GPU's memory that this process may take")


def pytest_configure(config: pytest.Config) -> None:
    share = config.getoption("--memory-share")
    if share and torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(share)


@pytest.hookimpl(trylast=True)  # after -m and -k have chosen
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    index, count = (int(part) for part in config.getoption("--shard").split("/"))
    if not 1 <= index <= count:
        raise pytest.UsageError(f"--shard {index}/{count}: the first number goes from 1 to the second")
    config.hook.pytest_deselected(items=[item for i, item in enumerate(items) if i % count != index - 1])
    items[:] = items[index - 1 :: count]
