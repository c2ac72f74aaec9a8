"""Every setting has a place in the rules of resuming."""

import dataclasses

import pytest

from eclip.config import RunConfig
from eclip.presets import PRESETS
from eclip.training.checkpoint.resume_rules import (
    BY_STEP,
    MAY_CHANGE,
    MUST_BE_EQUAL,
    NO_MATTER,
    describe_changes,
    flatten,
    require_same_batches,
    require_same_run,
)

DEBUG = PRESETS["debug"]


def test_every_setting_is_in_exactly_one_class() -> None:
    """A new field: does what the weights mean depend on it, is it worth a word, or neither? Add it to resume_rules."""
    classes = {"MUST_BE_EQUAL": MUST_BE_EQUAL, "MAY_CHANGE": MAY_CHANGE, "BY_STEP": BY_STEP, "NO_MATTER": NO_MATTER}
    settings = set(flatten(DEBUG))
    for name in settings:
        found = [title for title, members in classes.items() if name in members]
        assert len(found) == 1, f"{name} is in {found}"
    assert set().union(*classes.values()) <= settings, "a setting that is no more"


def test_what_the_weights_mean_must_be_equal() -> None:
    objective = {f"objective.{f.name}" for f in dataclasses.fields(DEBUG.objective)}
    model = {f"model.{f.name}" for f in dataclasses.fields(DEBUG.model)} - {"model.vocab_size", "model.kernels"}
    assert objective | model | {"lock_image", "lock_text", "seed"} <= MUST_BE_EQUAL


def test_each_difference_is_named_with_both_values() -> None:
    other = dataclasses.replace(
        DEBUG, seed=3, lock_image=True, steps=9, optim=dataclasses.replace(DEBUG.optim, beta1=0.5)
    )
    with pytest.raises(
        ValueError, match=r"runs/debug: --resume with another seed \(the run has 0, the flags give 3\), "
    ) as e:
        require_same_run(DEBUG, other)
    assert "another lock_image (the run has False, the flags give True)" in str(e.value)
    assert "steps" not in str(e.value)
    assert describe_changes(DEBUG, other) == "resumed with changed settings: steps 5 -> 9, beta1 0.9 -> 0.5"
    require_same_run(DEBUG, dataclasses.replace(DEBUG, steps=9))
    assert describe_changes(DEBUG, DEBUG) is None


def _with(batch: int = 8, schedule: str | None = None) -> RunConfig:
    return dataclasses.replace(DEBUG, global_batch_size=batch, batch_schedule=schedule)


def test_batch_sizes_of_steps_that_are_done_must_be_equal() -> None:
    """And no others: how large later steps are may still be decided."""
    growing = _with(schedule="0:4,10:8")
    for one, two, step in (
        (_with(8), _with(64, "0:8"), 5),
        (_with(8), _with(64, "0:8,5:16"), 5),
        (growing, _with(4), 10),
        (growing, _with(schedule="0:4,5:4,10:8,30:16"), 30),
        (growing, _with(schedule="0:4,12:16"), 10),
    ):
        require_same_batches(one, two, step)
        require_same_batches(two, one, step)
    with pytest.raises(ValueError, match=r"another global_batch_size \(the run has 8, the flags give 16\) for the 3"):
        require_same_batches(_with(8), _with(16), 3)
    words = r"another batch_schedule \(the run has 0:4,10:8, the flags give 0:4\) .* from step 11 on --batch-schedule"
    with pytest.raises(ValueError, match=words):
        require_same_batches(growing, _with(4), 11)
    with pytest.raises(ValueError, match=r"another batch_schedule \(the run has 0:8, the flags give 0:8,2:4\)"):
        require_same_batches(_with(8), _with(schedule="0:8,2:4"), 3)


def test_a_change_of_later_sizes_and_of_micro_batches_is_said() -> None:
    other = dataclasses.replace(_with(8, "0:8,50:16"), micro_batch=2)
    words = "resumed with changed settings: micro_batch None -> 2, batch_schedule 0:8 -> 0:8,50:16"
    assert describe_changes(_with(8), other) == words
    assert describe_changes(_with(8), _with(64, "0:8")) is None
