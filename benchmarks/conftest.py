"""The `bench` fixture (harness/bench.py), a GPU's clock for every benchmark, and the machine in every record."""

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.harness.bench import Bench
from benchmarks.harness.capture import give_back_memory
from benchmarks.harness.clock import cuda_clock
from benchmarks.harness.machine import ON_GPU, versions
from benchmarks.harness.roofline import measure_roofline

ROOFLINE = pytest.StashKey[dict[str, Any]]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if ON_GPU:
        for item in items:
            item.add_marker(pytest.mark.benchmark(timer=cuda_clock))


@pytest.fixture(scope="session")
def roofline(request: pytest.FixtureRequest) -> dict[str, Any]:
    """{"copy_bytes_per_s", "matmul_flops_per_s"} of this GPU in this session; {} on a CPU."""
    measured = measure_roofline() if ON_GPU else {}
    request.config.stash[ROOFLINE] = measured
    return measured


@pytest.fixture(scope="session")
def _flush() -> Tensor | None:
    # Four times the 60 MB of an H200's L2: what the previous round read is gone, and what it wrote is written back.
    return torch.zeros(64 << 20, dtype=torch.float32, device="cuda") if ON_GPU else None


@pytest.fixture
def bench(benchmark: Any, roofline: dict[str, float], _flush: Tensor | None) -> Iterator[Bench]:
    """Time one call; see harness/bench.py."""
    yield Bench(benchmark, roofline, _flush)
    if ON_GPU:  # the memory of this test's graph belongs to the next test
        gc.collect()
        give_back_memory()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Too large for this GPU is no failure. A new exception: the old one's frames would hold the memory."""
    try:
        return (yield)
    except torch.OutOfMemoryError as error:
        message = str(error).splitlines()[0]
    pytest.skip(f"out of memory: {message}")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.update(versions())


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]) -> None:
    output_json["roofline"] = config.stash.get(ROOFLINE, {})
