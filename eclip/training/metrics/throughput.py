"""The rates among the numbers: pairs a second, waits for data, the share of a GPU's peak, memory, time to the end."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from eclip.dataloading.schedule import BatchSchedule
from eclip.training.metrics.flops import ModelFlops
from eclip.training.metrics.peaks import peak_flops, peak_memory
from eclip.training.metrics.spans import span


class Throughput:
    """Rates since the last report: image-text pairs a second, time spent waiting for data, model FLOPs utilisation.

    Steps that are not like the others count nowhere: the process's first one, in which blocks are compiled, kernels
    chosen and memory is found, and those whose FLOPs are counted. After them the device is waited for.
    """

    def __init__(self, schedule: BatchSchedule, total_steps: int, start_step: int, device: torch.device) -> None:
        self.schedule, self.total_steps, self.start_step, self.device = schedule, total_steps, start_step, device
        self.peak_flops = peak_flops(device)
        self.flops: dict[int, float] = {}
        """FLOPs of one step on one rank, by size of the global batch; without any, mfu is left out."""
        self.first_step_seconds: float | None = None
        self._step = start_step
        self._begin_interval(start_step)

    def _begin_interval(self, step: int) -> None:
        self.data_seconds, self._reported_step, self._reported_at = 0.0, step, time.perf_counter()
        self._apart_pairs, self._apart_seconds = 0, 0.0

    @property
    def wants_flops(self) -> bool:
        """Whether the step that is taken is to be counted: on a GPU with a known peak, once for each batch size.

        Not the first one: it would be run uncompiled, and the compiler's time would fall into the next.
        """
        unknown = self.schedule.size(self._step) not in self.flops
        return self.peak_flops is not None and unknown and self._step > self.start_step

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the fetch of a batch."""
        began = time.perf_counter()
        with span("data"):
            yield
        self.data_seconds += time.perf_counter() - began

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Around what is no part of training, as validation and the writing of a profile: no rate counts its time."""
        began = time.perf_counter()
        yield
        self._reported_at += time.perf_counter() - began

    @contextmanager
    def taking(self, step: int) -> Iterator[None]:
        """Around a step; `step` of them are done."""
        self._step = step
        if step != self.start_step and not self.wants_flops:
            yield
            return
        _finish(self.device)
        began = time.perf_counter()
        yield
        _finish(self.device)
        seconds = time.perf_counter() - began
        self._apart_seconds += seconds
        self._apart_pairs += self.schedule.size(step)
        if step == self.start_step:
            self.first_step_seconds = seconds

    def report(self, step: int) -> dict[str, float]:
        """Numbers of the steps since the last report, `step` of them done in all."""
        position = self.schedule.position
        seconds, pairs = time.perf_counter() - self._reported_at, position(step) - position(self._reported_step)
        steps = step - self._reported_step
        if pairs > self._apart_pairs:  # else there are no others to go by
            seconds, pairs = seconds - self._apart_seconds, pairs - self._apart_pairs
        rate = pairs / seconds
        values = {
            "pairs_per_second": rate,
            "data_seconds": self.data_seconds / steps,
            "memory_gib": peak_memory(self.device) / 2**30,
            "eta_seconds": (position(self.total_steps) - position(step)) / rate,
        }
        if self.flops and self.peak_flops is not None:
            # Of the newest size: per pair, sizes differ in the contrastive losses alone, 0.05% of a step of 16k pairs.
            size, flops = list(self.flops.items())[-1]
            values["mfu"] = flops / size * rate / self.peak_flops
        self._begin_interval(step)
        return values


@contextmanager
def count_flops(throughput: Throughput) -> Iterator[None]:
    """Around the passes of the step that is taken: their FLOPs become those of its batch size."""
    with ModelFlops() as counter:
        yield
    throughput.flops[throughput.schedule.size(throughput._step)] = float(counter.total)


def first_step_note(seconds: float) -> str:
    """What a run with --compile says after its first step."""
    return f"first step: {seconds:.1f} s, most of which compiled the blocks (--compile); the next ones do not"


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
