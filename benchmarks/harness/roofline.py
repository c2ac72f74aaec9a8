"""What this GPU does at best, measured in the session that the rows are from: a copy, and a bf16 matmul."""

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.harness.capture import capture
from benchmarks.harness.clock import cuda_clock


def median_seconds(call: Callable[[], Any], rounds: int = 20) -> float:
    """Median device time of one replay of `call`."""
    replay, _ = capture(call, warmup=3)
    spans = []
    for _ in range(rounds):
        replay()  # keeps the GPU busy while the CPU enqueues the round: no launch gap between the events
        start = cuda_clock()
        replay()
        spans.append(cuda_clock() - start)
    return sorted(spans)[rounds // 2]


def measure_roofline() -> dict[str, Any]:
    """Bandwidth of a 1 GiB copy and rate of an 8192^3 bf16 matmul of random data, on the current GPU."""
    source = torch.empty(2**29, dtype=torch.bfloat16, device="cuda").normal_()
    target = torch.empty_like(source)
    copy = median_seconds(lambda: target.copy_(source))
    a, b = source[: 2**26].view(8192, 8192), source[2**26 : 2**27].view(8192, 8192)
    out = target[: 2**26].view(8192, 8192)
    matmul = median_seconds(lambda: torch.mm(a, b, out=out))
    return {"copy_bytes_per_s": 2 * source.nbytes / copy, "matmul_flops_per_s": 2 * 8192**3 / matmul}
