"""Rates, and the share of a peak."""

import time

import pytest
import torch

from eclip.training.metrics.throughput import Throughput, count_flops


def test_throughput() -> None:
    throughput = Throughput(total_steps=10, start_step=2, pairs_per_step=8, device=torch.device("cpu"))
    with throughput.waiting():
        time.sleep(0.02)
    values = throughput.report(4)
    seconds = 8 / values["pairs_per_second"]
    assert 0.01 <= values["data_seconds"] <= seconds
    assert values["eta_seconds"] == pytest.approx(6 * seconds)
    assert 0.01 < values["memory_gib"] < 1000
    assert "mfu" not in values  # no peak is known for a CPU
    assert throughput.report(5)["data_seconds"] == 0


def test_mfu_from_counted_flops() -> None:
    throughput = Throughput(total_steps=2, start_step=0, pairs_per_step=1, device=torch.device("cpu"))
    throughput.peak_flops = 1e12
    assert throughput.wants_flops
    weight = torch.randn(16, 32, requires_grad=True)
    with count_flops(throughput):
        (torch.randn(8, 16) @ weight).sum().backward()
    assert throughput.flops_per_step == 2 * 2 * 8 * 16 * 32  # the product and its gradient for the weight
    assert not throughput.wants_flops
    values = throughput.report(1)
    assert values["mfu"] == pytest.approx(throughput.flops_per_step * values["pairs_per_second"] / 1e12)
