"""Device time between two CUDA events, and how often to time a call."""

import torch

ROUNDS, ROUNDS_SECONDS = 30, 2.0  # of a row on a GPU: whichever is reached first


class CudaTime:
    """A point in the GPU's time; the difference of two is seconds."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, start: "CudaTime") -> float:
        self.event.synchronize()
        return start.event.elapsed_time(self.event) / 1e3


def cuda_clock() -> CudaTime:
    """pytest-benchmark's timer on a GPU."""
    return CudaTime()


def rounds_for(seconds: float) -> int:
    """How often to time a call that takes as long."""
    return max(3, min(ROUNDS, int(ROUNDS_SECONDS / seconds)))
