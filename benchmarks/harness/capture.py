"""Capture a call in a CUDA graph, so that no launch by the host is timed; say why where that cannot be.

A call that makes the host wait is found by trying it before a capture: one that fails may spoil all later ones.
"""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from benchmarks.harness.machine import ON_GPU


@functools.cache
def side_stream() -> torch.cuda.Stream:
    """Where calls are warmed up and captured. One for all: a backward runs on the stream of its forward."""
    return torch.cuda.Stream()


def on_side_stream() -> AbstractContextManager[object]:
    return torch.cuda.stream(side_stream()) if ON_GPU else nullcontext()


def host_waits(call: Callable[[], Any]) -> bool:
    """Whether `call` makes the host wait for the GPU (`.item()`, `.nonzero()`...), so that no graph can hold it."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


class Captures:
    """Whether this process can still capture."""

    broken = ""
    """Why not: torch 2.11 never ends a capture that failed, and refuses all later ones, and to give memory back."""


def capture(call: Callable[[], Any], warmup: int) -> tuple[Callable[[], Any], str]:
    """Warm `call` up and capture it in a CUDA graph. Returns (replay or the call itself, how it is launched)."""
    if Captures.broken:
        return call, f"launches ({Captures.broken})"
    if host_waits(call):
        return call, "launches (the host waits)"
    stream = side_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warmup):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            result = call()
    except RuntimeError as error:
        torch.cuda.synchronize()
        side_stream.cache_clear()  # what follows starts on a stream that no failed capture has touched
        if not give_back_memory():
            Captures.broken = "an earlier capture failed"
        return call, f"launches (capture failed: {str(error).splitlines()[0][:80]})"

    def replay() -> Any:
        graph.replay()
        return result

    return replay, "graph"


def give_back_memory() -> bool:
    """Return what no tensor holds to the GPU; False where a capture that failed does not let torch do so."""
    try:
        torch.cuda.empty_cache()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return False
    return True
