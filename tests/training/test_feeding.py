"""Parts of a step come together, complete, and only when all of them are there."""

import dataclasses
from collections.abc import Iterator

import pytest
import torch

from eclip.dataloading.schema import Batch
from eclip.objectives.objective import make_objective
from eclip.objectives.settings import ObjectiveConfig
from eclip.presets import PRESETS
from eclip.training.feeding import Completion, Feed
from tests.model.tiny import TINY
from tests.objectives.batches import make_batch
from tests.training.run_folders import ALONE

CPU = torch.device("cpu")


def _completion(rank: int = 0, world_size: int = 1) -> Completion:
    debug = PRESETS["debug"]
    config = dataclasses.replace(debug, model=TINY, data=dataclasses.replace(debug.data, max_tokens=16))
    ranks = dataclasses.replace(ALONE, rank=rank, world_size=world_size)
    return Completion(make_objective(ObjectiveConfig(token_keep=0.5)), config, None, ranks)


def _batches(parts: int, steps: int) -> Iterator[Batch]:
    for step in range(steps):
        for part in range(parts):
            yield dataclasses.replace(make_batch(4), step=step, part=part, parts=parts)


def test_a_step_has_its_parts_with_the_draws_of_their_rows() -> None:
    feed = Feed(_batches(3, 2), _completion(rank=1, world_size=2), CPU)
    objective = make_objective(ObjectiveConfig(token_keep=0.5))
    for step in range(2):
        parts = feed.next()
        whole = objective.draw(24, range(24), TINY, step=step, seed=0)
        assert [(p.batch.step, p.batch.part, p.draws.first) for p in parts] == [(step, k, 12 + 4 * k) for k in range(3)]
        assert whole.prompts is not None
        for k, part in enumerate(parts):
            assert part.draws.prompts is not None
            rows = slice(12 + 4 * k, 16 + 4 * k)
            assert torch.equal(part.draws.prompts.products, whole.prompts.products[rows])
            assert torch.equal(part.draws.prompts.gumbel, whole.prompts.gumbel[rows])
            assert part.draws.kept is not None
            assert whole.kept is not None
            assert torch.equal(part.draws.kept, whole.kept)


def test_a_step_comes_whole_or_not_at_all() -> None:
    """What ends the wait for a part ends the batches, as a loader's generator does: no half step is given later."""

    def interrupted() -> Iterator[Batch]:
        for number, batch in enumerate(_batches(2, 2)):
            if number == 1:
                raise KeyboardInterrupt
            yield batch

    feed = Feed(interrupted(), _completion(), CPU)
    with pytest.raises(KeyboardInterrupt):
        feed.next()
    with pytest.raises(StopIteration):
        feed.next()
