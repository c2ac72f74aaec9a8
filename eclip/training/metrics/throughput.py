"""The rates among the numbers: pairs a second, waits for data, the share of a GPU's peak, memory."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils.flop_counter import FlopCounterMode

from eclip.training.metrics.peaks import peak_flops, peak_memory


class Throughput:
    """Rates since the last report: image-text pairs a second, time spent waiting for data, model FLOPs utilisation."""

    def __init__(self, total_steps: int, start_step: int, pairs_per_step: int, device: torch.device) -> None:
        self.total_steps, self.pairs_per_step, self.device = total_steps, pairs_per_step, device
        self.peak_flops = peak_flops(device)
        self.flops_per_step: float | None = None
        """FLOPs of one step on one rank; None leaves mfu out."""
        self.data_seconds, self.reported_step, self.reported_at = 0.0, start_step, time.perf_counter()

    @property
    def wants_flops(self) -> bool:
        """Whether one step is still to be counted: on a GPU with a known peak, once."""
        return self.peak_flops is not None and self.flops_per_step is None

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the fetch of a batch."""
        began = time.perf_counter()
        yield
        self.data_seconds += time.perf_counter() - began

    def report(self, step: int) -> dict[str, float]:
        """Numbers of the steps since the last report, `step` of them done in all."""
        now, steps = time.perf_counter(), step - self.reported_step
        seconds = (now - self.reported_at) / steps
        values = {
            "pairs_per_second": self.pairs_per_step / seconds,
            "data_seconds": self.data_seconds / steps,
            "memory_gib": peak_memory(self.device) / 2**30,
            "eta_seconds": (self.total_steps - step) * seconds,
        }
        if self.flops_per_step is not None and self.peak_flops is not None:
            values["mfu"] = self.flops_per_step / seconds / self.peak_flops
        self.data_seconds, self.reported_step, self.reported_at = 0.0, step, now
        return values


@contextmanager
def count_flops(throughput: Throughput) -> Iterator[None]:
    """Around one step: its matrix products become `throughput.flops_per_step`.

    Custom kernels are not seen, so mfu is a lower bound.
    """
    with FlopCounterMode(display=False) as counter:
        yield
    throughput.flops_per_step = float(counter.get_total_flops())
