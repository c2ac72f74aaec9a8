"""A batch for the model of tests/model/tiny.py, and its losses."""

import dataclasses
from typing import Any

import torch

from eclip.dataloading.schema import Batch
from eclip.model.eclip import ECLIP
from eclip.objectives.objective import make_objective
from eclip.objectives.settings import ObjectiveConfig
from eclip.training.momentum import make_momentum
from tests.model.tiny import TINY

B, T = 7, TINY.num_queries
DEFAULT = ObjectiveConfig()


def make_batch(count: int = B, **changes: torch.Tensor) -> Batch:
    """`count` products, all different, two of each catalog id; `changes` replace fields."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(2, 9, (2 * count,), generator=generator)
    bounds = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]).int()
    facts = {
        "images": torch.randint(0, 256, (count, 2, 3, 32, 32), generator=generator, dtype=torch.uint8),
        "image_rows": torch.arange(2 * count).reshape(count, 2),
        "tokens": torch.randint(5, 50, (int(lengths.sum()),), generator=generator),
        "cu_seqlens": bounds,
        "product_ids": torch.arange(count),
        "catalog_ids": torch.arange(count) // 2,
        "category_ids": torch.zeros(count, dtype=torch.long),
        "title_ids": torch.arange(2 * count).reshape(count, 2),
    }
    return Batch(**{**facts, **changes}, keys=[f"k{i}" for i in range(2 * count)], step=0, epoch=0)


def compute_losses(
    model: ECLIP, batch: Batch, config: ObjectiveConfig = DEFAULT, *, step: int = 3, seed: int = 5, **options: Any
) -> dict[str, torch.Tensor]:
    """Of one process, with a fresh momentum model."""
    objective = make_objective(config)
    momentum = make_momentum(model) if objective.needs_momentum else None
    batch = dataclasses.replace(batch, step=step)
    draws = objective.draw(len(batch.product_ids), range(len(batch.product_ids)), model.config, step=step, seed=seed)
    return objective.losses(model, momentum, batch, draws, **options)
