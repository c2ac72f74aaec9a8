"""What the benchmarks stand on: counting saved bytes, backward passes on their own, shards, and the plan of gpu.sh."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.harness import bench as harness
from benchmarks.harness import shard
from benchmarks.harness.activations import kept_for_backward
from benchmarks.harness.bench import Bench, rounds_for

ROOT = Path(__file__).resolve().parents[3]


def test_each_storage_that_the_graph_holds_counts_once() -> None:
    x = torch.randn(10, 10, requires_grad=True)
    weight = torch.randn(10, 10, requires_grad=True)

    def call() -> Tensor:
        hidden = x.exp()  # 400 bytes: saved by exp, by both products, one of them through a view
        (hidden * hidden.exp()).sum()  # a branch that nothing returned needs
        return (hidden @ weight).sum() + (hidden[:5] @ weight).sum()

    assert kept_for_backward(call, [x, weight]) == 400
    assert kept_for_backward(call, [x]) == 800
    assert kept_for_backward(lambda: x + weight, []) == 0


def test_own_functions_are_counted_and_still_differentiate() -> None:
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(torch.ones(50))
            return 2 * x

        @staticmethod
        def backward(ctx, grad):
            return 2 * grad * ctx.saved_tensors[0].mean()

    x = torch.randn(3, requires_grad=True)
    assert kept_for_backward(lambda: Double.apply(x), [x]) == 200


def test_backward_calls_return_the_gradients() -> None:
    bench = Bench(None, {}, None)
    a, b, weight = (torch.randn(4, 4, device=bench.device) for _ in range(3))
    weight.requires_grad_()
    seeds = [torch.randn(4, 4, device=bench.device), torch.randn((), device=bench.device)]

    def function(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return a @ b @ weight, (a * b).sum()

    leaves = [a.clone().requires_grad_(), b.clone().requires_grad_()]
    expected = torch.autograd.grad(function(*leaves), [*leaves, weight], seeds)
    torch.testing.assert_close(bench.backward(function, a, b, seeds=seeds, also=[weight])(), expected)
    alone = bench.backward_alone(function, a, b, seeds=seeds)
    for _ in range(2):
        torch.testing.assert_close(alone(), expected[:2])
    assert not a.requires_grad
    assert weight.grad is None
    # A scalar needs no seed, and draws one.
    assert bench.backward(lambda a: a.sum(), a)()[0].unique().numel() == 1


def test_slow_calls_get_fewer_rounds() -> None:
    assert [rounds_for(seconds) for seconds in (1e-6, 0.05, 0.2, 7.0)] == [30, 30, 10, 3]


def test_shards_divide_the_tests() -> None:
    found: list[int] = []
    for index in range(1, 4):
        items, left_out = list(range(10)), []
        config = SimpleNamespace(
            getoption=lambda name, index=index: f"{index}/3",
            hook=SimpleNamespace(pytest_deselected=lambda items, out=left_out: out.extend(items)),
        )
        shard.pytest_collection_modifyitems(config, items)
        assert sorted(items + left_out) == list(range(10))
        found += items
    assert sorted(found) == list(range(10))


def test_a_shard_outside_the_count_is_refused() -> None:
    config = SimpleNamespace(getoption=lambda name: "4/3")
    with pytest.raises(pytest.UsageError, match="4/3"):
        shard.pytest_collection_modifyitems(config, [])


def test_gpu_plan_names_every_benchmark_and_fits_its_budget() -> None:
    plan = (ROOT / "benchmarks/gpu.sh").read_text()
    timed = re.findall(r"^bench \S+ (\d+) (.+)", plan, re.MULTILINE)
    files = {str(path.relative_to(ROOT)) for path in (ROOT / "benchmarks").glob("bench_*.py")}
    assert {file for _, rest in timed for file in re.findall(r"benchmarks/bench_\w+\.py", rest)} == files
    (beside_each_other,) = set(re.findall(r"part (\d+) ", plan))  # tests and caches run at the same time
    (budget,) = re.findall(r"^budget=\$\{BUDGET:-(\d+)\}", plan, re.MULTILINE)
    total = int(beside_each_other) + sum(int(limit) for limit, _ in timed)
    assert f"add up to {total}" in plan
    assert total < int(budget) < 9 * 60
    limits = {name: int(limit) for name, limit in re.findall(r"^bench (\S+) (\d+)", plan, re.MULTILINE)}
    assert limits["contrastive_loss_ours"] >= 70  # about 40 s of it are expected, a third of them for 262k and 1M pairs


# --- Capture, with as much of a GPU as it asks for --------------------------------------------------------------------


class FakeGPU:
    """torch.cuda: calls may synchronise, captures may fail; after one that did, torch 2.11 refuses what follows."""

    OutOfMemoryError = torch.OutOfMemoryError

    def __init__(self, leaks: bool = True) -> None:
        self.mode, self.capturing, self.underway, self.leaks = "default", False, False, leaks
        self.captured = 0

    def set_sync_debug_mode(self, mode: str) -> None:
        self.mode = mode

    def item(self) -> None:
        """What a call does that makes the host wait."""
        if self.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        if self.capturing:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    def current_stream(self) -> Any:
        return self

    def wait_stream(self, other: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def empty_cache(self) -> None:
        if self.underway:
            raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")

    CUDAGraph = SimpleNamespace

    def Stream(self) -> Any:
        return self

    @contextlib.contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        yield

    @contextlib.contextmanager
    def graph(self, graph: Any, stream: Any) -> Iterator[None]:
        self.empty_cache()
        self.capturing = True
        try:
            yield
        except RuntimeError:
            self.underway = self.leaks
            raise
        finally:
            self.capturing = False
        self.captured += 1


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGPU]:
    gpu = FakeGPU()
    monkeypatch.setattr(torch, "cuda", gpu)
    monkeypatch.setattr(harness.Captures, "broken", "")
    harness.side_stream.cache_clear()
    yield gpu
    harness.side_stream.cache_clear()


def test_calls_that_wait_are_not_captured(gpu: FakeGPU) -> None:
    """Whether or not their provider is known to."""
    call, timing = harness.capture(gpu.item, warmup=1)
    assert call == gpu.item and timing == "launches (the host waits)"
    assert gpu.mode == "default" and not gpu.underway
    assert harness.capture(lambda: 1, warmup=1)[1] == "graph"


@pytest.mark.parametrize("leaks", [True, False], ids=["torch 2.11", "torch 2.12"])
def test_a_failed_capture_spoils_no_later_row(gpu: FakeGPU, leaks: bool) -> None:
    """What capture alone forbids, so that no trial shows it."""
    gpu.leaks = leaks

    def fails_in_capture() -> None:
        if gpu.capturing:
            gpu.item()

    _, timing = harness.capture(fails_in_capture, warmup=1)
    assert timing == "launches (capture failed: operation not permitted when stream is capturing)"
    assert harness.give_back_memory() != leaks
    _, timing = harness.capture(lambda: 1, warmup=1)
    assert timing == ("launches (an earlier capture failed)" if leaks else "graph")
    assert gpu.captured == (not leaks)


def test_other_errors_of_a_trial_are_errors(gpu: FakeGPU) -> None:
    for error in (torch.OutOfMemoryError("out of memory"), RuntimeError("shapes differ"), ValueError("no")):

        def fail(error: Exception = error) -> None:
            raise error

        with pytest.raises(type(error)):
            harness.capture(fail, warmup=1)
        assert gpu.mode == "default"


def test_l2_is_flushed_by_reading() -> None:
    """A write would leave lines that the timed call has to write back."""
    flush = torch.zeros(8)
    before = flush._version
    Bench(None, {}, flush)._refill_l2()
    assert flush._version == before
