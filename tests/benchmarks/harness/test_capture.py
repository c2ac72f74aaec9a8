"""Capture in a CUDA graph, with as much of a GPU as it asks for."""

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.harness.capture import Captures, capture, give_back_memory, side_stream


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
    monkeypatch.setattr(Captures, "broken", "")
    side_stream.cache_clear()
    yield gpu
    side_stream.cache_clear()


def test_calls_that_wait_are_not_captured(gpu: FakeGPU) -> None:
    """Whether or not their provider is known to."""
    call, timing = capture(gpu.item, warmup=1)
    assert call == gpu.item and timing == "launches (the host waits)"
    assert gpu.mode == "default" and not gpu.underway
    assert capture(lambda: 1, warmup=1)[1] == "graph"


@pytest.mark.parametrize("leaks", [True, False], ids=["torch 2.11", "torch 2.12"])
def test_a_failed_capture_spoils_no_later_row(gpu: FakeGPU, leaks: bool) -> None:
    """What capture alone forbids, so that no trial shows it."""
    gpu.leaks = leaks

    def fails_in_capture() -> None:
        if gpu.capturing:
            gpu.item()

    _, timing = capture(fails_in_capture, warmup=1)
    assert timing == "launches (capture failed: operation not permitted when stream is capturing)"
    assert give_back_memory() != leaks
    _, timing = capture(lambda: 1, warmup=1)
    assert timing == ("launches (an earlier capture failed)" if leaks else "graph")
    assert gpu.captured == (not leaks)


def test_other_errors_of_a_trial_are_errors(gpu: FakeGPU) -> None:
    for error in (torch.OutOfMemoryError("out of memory"), RuntimeError("shapes differ"), ValueError("no")):

        def fail(error: Exception = error) -> None:
            raise error

        with pytest.raises(type(error)):
            capture(fail, warmup=1)
        assert gpu.mode == "default"
