"""Every setting has a place in the rules of resuming."""

import dataclasses

import pytest

from eclip.presets import PRESETS
from eclip.training.checkpoint.resume_rules import (
    MAY_CHANGE,
    MUST_BE_EQUAL,
    NO_MATTER,
    describe_changes,
    flatten,
    require_same_run,
)

DEBUG = PRESETS["debug"]


def test_every_setting_is_in_exactly_one_class() -> None:
    """A new field: does what the weights mean depend on it, is it worth a word, or neither? Add it to resume_rules."""
    classes = {"MUST_BE_EQUAL": MUST_BE_EQUAL, "MAY_CHANGE": MAY_CHANGE, "NO_MATTER": NO_MATTER}
    settings = set(flatten(DEBUG))
    for name in settings:
        found = [title for title, members in classes.items() if name in members]
        assert len(found) == 1, f"{name} is in {found}"
    assert set().union(*classes.values()) <= settings, "a setting that is no more"


def test_what_the_weights_mean_must_be_equal() -> None:
    objective = {f"objective.{f.name}" for f in dataclasses.fields(DEBUG.objective)}
    model = {f"model.{f.name}" for f in dataclasses.fields(DEBUG.model)} - {"model.vocab_size", "model.kernels"}
    assert objective | model | {"lock_image", "lock_text", "seed", "global_batch_size"} <= MUST_BE_EQUAL


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
