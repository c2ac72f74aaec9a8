"""--epochs and --fit-... to numbers, and which sizes of a batch are refused."""

import dataclasses
from typing import Any

import pytest

from eclip.parallel.ranks import Ranks
from eclip.presets import PRESETS
from eclip.training.starting.batches import as_begun, check_batches, resolve_sizes
from tests.training.run_folders import ALONE

FOUR = dataclasses.replace(ALONE, world_size=4)


def changed(preset: Any = "debug", **changes: Any) -> Any:
    return dataclasses.replace(PRESETS[preset], **changes)


@pytest.mark.parametrize(
    ("epochs", "products", "schedule", "steps"),
    [(15, 1000, None, 1875), (0.001, 100, None, 1), (2, 9, None, 3), (3, 100, "0:10,5:50", 10)],
)
def test_epochs_are_steps_of_the_catalogue(epochs: float, products: int, schedule: str | None, steps: int) -> None:
    config, notes = resolve_sizes(changed(epochs=epochs, batch_schedule=schedule), products, 1)
    assert config.steps == steps
    assert config.schedule.position(steps) >= epochs * products
    assert f"{steps} steps" in notes[0]


def test_the_papers_presets_follow_the_catalogue() -> None:
    config, notes = resolve_sizes(PRESETS["vit_b16"], 1_000_000, 8)
    assert (config.steps, notes[1:]) == (3663, ())
    _, notes = resolve_sizes(PRESETS["vit_b16"], 10_000, 8)
    assert "warmup_steps=2000 of 37 steps: the learning rate only rises; --warmup-steps 1" in notes[1]


def test_settings_without_a_catalogue_stay() -> None:
    assert resolve_sizes(PRESETS["demo"], 400, 2) == (PRESETS["demo"], ())


def test_a_shop_takes_all_sizes_from_its_catalogue() -> None:
    config, notes = resolve_sizes(PRESETS["shop"], 407, 1)
    assert (config.global_batch_size, config.steps, config.optim.warmup_steps) == (64, 191, 9)
    assert notes == ("407 products: batches of 64, 191 steps, 30.0 passes",)
    assert resolve_sizes(config, 407, 1)[0] == config


def test_too_few_products_leave_the_started_weights_as_they_are() -> None:
    config, (note,) = resolve_sizes(PRESETS["shop"], 25, 1)
    assert (config.steps, config.optim.warmup_steps) == (0, 0)
    assert "25 products are too few to train on (300" in note
    assert "--steps 47 trains all the same" in note


def test_without_a_trained_model_few_products_are_trained_on_and_told() -> None:
    config, notes = resolve_sizes(PRESETS["shop_gpu"], 25, 1)
    assert config.steps == 47
    assert "few to learn from" in notes[0]


def test_a_small_catalogue_needs_no_micro_batch() -> None:
    assert resolve_sizes(PRESETS["shop_gpu"], 407, 1)[0].micro_batch is None
    large = resolve_sizes(PRESETS["shop_gpu"], 40_000, 1)[0]
    assert (large.global_batch_size, large.micro_batch) == (4096, 64)


def test_a_resumed_run_keeps_the_fitted_batch() -> None:
    begun, _ = resolve_sizes(PRESETS["shop"], 407, 1)
    assert as_begun(begun, PRESETS["shop"]).global_batch_size == 64
    own = dataclasses.replace(PRESETS["shop"], fit_batch=0, global_batch_size=32)
    assert as_begun(begun, own) == own


@pytest.mark.parametrize(
    ("changes", "ranks", "words"),
    [
        ({"global_batch_size": 10}, FOUR, r"global_batch_size=10 .*multiple of 4, here 8 or 12"),
        ({"batch_schedule": "0:8,5:18"}, FOUR, r"5:18 does not divide over 4 ranks; .*--batch-schedule .*16 or 20"),
        (
            {"global_batch_size": 24, "micro_batch": 4},
            FOUR,
            r"4 ranks x micro_batch=4; .*multiple of 16.*--micro-batch",
        ),
        ({"global_batch_size": 8, "micro_batch": 16}, ALONE, r"1 rank x micro_batch=16; .*--micro-batch"),
        ({"batch_schedule": "0:2,9:8"}, ALONE, "at least 4"),
        ({"model": dataclasses.replace(PRESETS["debug"].model, kernels="reference")}, FOUR, "--kernels reference"),
    ],
)
def test_every_size_is_checked(changes: dict[str, Any], ranks: Ranks, words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        check_batches(changed(**changes), ranks)
    assert "\n" not in str(error.value)


def test_sizes_that_divide_pass() -> None:
    check_batches(changed(batch_schedule="0:8,9:16", micro_batch=2), FOUR)
