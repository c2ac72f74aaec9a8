"""Rates over steps of one size and of several; what a first step and a counted one leave out of them."""

import time

import pytest
import torch

from eclip.dataloading.schedule import BatchSchedule
from eclip.training.metrics import throughput as module
from eclip.training.metrics.throughput import Throughput, count_flops

CPU = torch.device("cpu")


class Clock:
    """A clock that stands still until it is told to go on."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now

    def take(self, throughput: Throughput, step: int, seconds: float) -> None:
        with throughput.taking(step):
            self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(module, "time", made)
    return made


def test_throughput() -> None:
    throughput = Throughput(BatchSchedule.constant(8), 10, 2, CPU)
    with throughput.waiting():
        time.sleep(0.02)
    values = throughput.report(4)
    seconds = 8 / values["pairs_per_second"]
    assert 0.01 <= values["data_seconds"] <= seconds
    assert values["eta_seconds"] == pytest.approx(6 * seconds)
    assert 0.01 < values["memory_gib"] < 1000
    assert "mfu" not in values  # no peak is known for a CPU
    assert throughput.report(5)["data_seconds"] == 0


def test_the_first_step_counts_nowhere(clock: Clock) -> None:
    throughput = Throughput(BatchSchedule.constant(8), 103, 3, CPU)
    clock.take(throughput, 3, 60.0)  # compiles
    for step in (4, 5):
        clock.take(throughput, step, 2.0)
    values = throughput.report(6)
    assert values["pairs_per_second"] == pytest.approx(4.0)
    assert values["eta_seconds"] == pytest.approx(97 * 2.0)
    assert throughput.first_step_seconds == 60.0
    clock.take(throughput, 6, 1.0)
    assert throughput.report(7)["pairs_per_second"] == pytest.approx(8.0)


def test_a_first_step_alone_is_what_there_is_to_tell(clock: Clock) -> None:
    throughput = Throughput(BatchSchedule.constant(8), 2, 0, CPU)
    clock.take(throughput, 0, 4.0)
    assert throughput.report(1)["pairs_per_second"] == pytest.approx(2.0)


def test_a_pause_is_no_part_of_a_rate(clock: Clock) -> None:
    throughput = Throughput(BatchSchedule.constant(8), 10, 0, CPU)
    clock.take(throughput, 0, 4.0)
    clock.take(throughput, 1, 2.0)
    with throughput.aside():
        clock.now += 30.0
    assert throughput.report(2)["pairs_per_second"] == pytest.approx(4.0)


def test_rates_across_a_change_of_size(clock: Clock) -> None:
    """Ten pairs a second all along: 2 steps of 10, then 2 of 30, and 6 of 30 to go."""
    throughput = Throughput(BatchSchedule.parse("0:10,3:30"), 11, 0, CPU)
    clock.take(throughput, 0, 50.0)
    for step, seconds in ((1, 1.0), (2, 1.0), (3, 3.0), (4, 3.0)):
        clock.take(throughput, step, seconds)
    values = throughput.report(5)
    assert values["pairs_per_second"] == pytest.approx(10.0)
    assert values["eta_seconds"] == pytest.approx(6 * 3.0)


def test_mfu_from_counted_flops(clock: Clock) -> None:
    """Counted once for each size, not in the first step, and that step's time is left out as well."""
    throughput = Throughput(BatchSchedule.parse("0:4,4:8"), 8, 0, CPU)
    assert not throughput.wants_flops
    throughput.peak_flops = 1e6
    weight = torch.randn(16, 32, requires_grad=True)
    counted = []
    for step in range(6):
        size = throughput.schedule.size(step)
        with throughput.taking(step):
            if throughput.wants_flops:
                counted.append(step)
                clock.now += 100.0
                with count_flops(throughput):
                    (torch.randn(size, 16) @ weight).sum().backward()
            clock.now += 0.5
    flops = 2 * 2 * 16 * 32  # of a row: the product and its gradient for the weight
    assert counted == [1, 4]
    assert throughput.flops == {4: 4 * flops, 8: 8 * flops}
    values = throughput.report(6)
    assert values["pairs_per_second"] == pytest.approx((4 + 4 + 8) / 1.5)
    assert values["mfu"] == pytest.approx(flops * values["pairs_per_second"] / 1e6)
