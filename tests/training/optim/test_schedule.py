"""The learning rate's course: warm-up, fall, and the rule for steps of a smaller batch."""

import dataclasses

import pytest

from eclip.config import OptimConfig
from eclip.dataloading.schedule import BatchSchedule
from eclip.training.optim import learning_rate

CONFIG = OptimConfig(learning_rate=1e-3, warmup_steps=10)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_schedule(schedule: str) -> None:
    config = dataclasses.replace(CONFIG, schedule=schedule)
    rates = [learning_rate(step, 110, config) for step in range(111)]
    assert rates[0] == pytest.approx(1e-4)
    assert rates[9] == rates[10] == max(rates) == pytest.approx(1e-3)
    assert rates[60] == pytest.approx(5e-4)  # half-way down, for both
    assert rates[35] == pytest.approx(7.5e-4 if schedule == "linear" else 1e-3 * (0.5 + 0.5 * 2**-0.5))
    assert rates[110] == pytest.approx(0, abs=1e-12)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))


def test_schedule_of_a_run_shorter_than_its_warmup() -> None:
    assert [learning_rate(s, 2, CONFIG) for s in range(2)] == pytest.approx([5e-4, 1e-3])
    assert learning_rate(0, 5, dataclasses.replace(CONFIG, warmup_steps=0)) == 1e-3


@pytest.mark.parametrize(("rule", "factor"), [("none", 1.0), ("sqrt", 0.5), ("linear", 0.25)])
def test_a_smaller_batch_learns_by_the_rule(rule: str, factor: float) -> None:
    batches = BatchSchedule.parse("0:1024,50:4096")
    scaled = dataclasses.replace(CONFIG, lr_scaling=rule)
    for step in (0, 5, 49, 50, 99):
        rate = learning_rate(step, 100, scaled, share=batches.size(step) / batches.largest)
        assert rate == (factor if step < 50 else 1.0) * learning_rate(step, 100, CONFIG)
    assert learning_rate(7, 100, scaled) == learning_rate(7, 100, CONFIG)  # one size: the rule says nothing
