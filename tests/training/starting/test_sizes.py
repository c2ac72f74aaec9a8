"""Batch, steps and warm-up by the number of products."""

import pytest

from eclip.training.starting.sizes import EPOCHS, MOST_STEPS, fitted_batch, fitted_steps, fitted_warmup


@pytest.mark.parametrize(
    ("products", "batch"), [(1, 16), (64, 16), (127, 16), (128, 32), (407, 64), (1023, 128), (1024, 256), (10**6, 256)]
)
def test_the_batch_is_a_power_of_two_up_to_a_quarter(products: int, batch: int) -> None:
    assert fitted_batch(products, 256) == batch


def test_the_batch_has_a_limit() -> None:
    assert fitted_batch(10**6, 4096) == 4096
    assert fitted_batch(10**6, 8) == 8


def test_steps_are_thirty_passes_within_limits() -> None:
    assert fitted_steps(299, 64) == 0
    for products, batch in ((300, 64), (407, 64), (5000, 256)):
        steps = fitted_steps(products, batch)
        assert (steps - 1) * batch < EPOCHS * products <= steps * batch
    assert fitted_steps(10**6, 256) == MOST_STEPS


def test_the_warmup_is_a_twentieth() -> None:
    assert [fitted_warmup(steps) for steps in (0, 19, 200)] == [0, 0, 10]
