"""Parts of a step out of a hand-made batch: what a loader and a feed would give."""

import dataclasses

import torch

from eclip.dataloading.schema import Batch
from eclip.model.settings import ModelConfig
from eclip.objectives.objective import Objective
from eclip.training.step import Part


def make_parts(batch: Batch, count: int, objective: Objective, model: ModelConfig, *, seed: int = 5) -> list[Part]:
    """The batch in `count` equal parts, rows in order, with their draws."""
    total = len(batch.product_ids)
    size = total // count
    draws = objective.draw(total, range(total), model, step=batch.step, seed=seed)
    starts = range(0, size * count, size)
    return [
        Part(_cut(batch, slice(start, start + size), k, count), None, draws.rows(start, start + size))
        for k, start in enumerate(starts)
    ]


def _cut(batch: Batch, rows: slice, part: int, parts: int) -> Batch:
    count = len(batch.product_ids)
    assert batch.images is not None
    texts = [text + view * count for view in (0, 1) for text in range(rows.start, rows.stop)]
    bounds = batch.cu_seqlens.tolist()
    pieces = [batch.tokens[bounds[text] : bounds[text + 1]] for text in texts]
    lengths = torch.tensor([0, *map(len, pieces)])
    return dataclasses.replace(
        batch,
        images=batch.images[rows],
        image_rows=batch.image_rows[rows],
        tokens=torch.cat(pieces),
        cu_seqlens=lengths.cumsum(0).int(),
        product_ids=batch.product_ids[rows],
        catalog_ids=batch.catalog_ids[rows],
        category_ids=batch.category_ids[rows],
        title_ids=batch.title_ids[rows],
        part=part,
        parts=parts,
    )
