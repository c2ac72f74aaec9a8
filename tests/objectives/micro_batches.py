"""A batch's gradients from micro-batches, by the three parts of an objective and nothing else of it.

Source: GradCache (arXiv 2101.06983), here with prompts from a pool. Micro-batch i of M acts as rank i of M.
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from eclip.dataloading.schema import Batch
from eclip.model.eclip import ECLIP
from eclip.objectives.objective import Encoded, Local, Objective


def split(batch: Batch, parts: int) -> list[Batch]:
    """The batch in `parts` equal ones, rows in order."""
    size = len(batch.product_ids) // parts
    return [_cut(batch, slice(i * size, (i + 1) * size)) for i in range(parts)]


def _cut(batch: Batch, rows: slice) -> Batch:
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
    )


def accumulate(
    objective: Objective, model: ECLIP, momentum: ECLIP | None, batch: Batch, parts: int, *, step: int, seed: int
) -> dict[str, Tensor]:
    """Losses of the batch; its gradients are in the model's parameters. No graph holds more than one micro-batch."""
    micros = split(batch, parts)

    def encode(micro: Batch) -> Encoded:
        return objective.features(model, momentum, micro, None, step=step, seed=seed)

    def local(i: int, encoded: Encoded) -> Local:
        return objective.local_losses(
            model, momentum, micros[i], encoded, pool, step=step, seed=seed, rank=i, world_size=parts
        )

    with torch.no_grad():
        encoded = [encode(micro) for micro in micros]
        pool = _join([e.pool for e in encoded])
        pairs = _join([e.pairs | local(i, e).pairs for i, e in enumerate(encoded)])
    leaves = {name: rows.requires_grad_() for name, rows in pairs.items()}
    losses = objective.pair_losses(model, leaves, batch)
    objective.weighted_sum(losses, step).backward()  # the temperature has its gradient from here
    size = len(batch.product_ids) // parts
    for i, micro in enumerate(micros):
        again = encode(micro)
        found = local(i, again)
        rows = again.pairs | found.pairs
        for name, value in found.losses.items():
            losses[name] = losses.get(name, 0) + value.detach() / parts
        total = _carry_on(rows, i * size, leaves)
        if found.losses:
            total = total + objective.weighted_sum(found.losses, step) / parts
        total.backward()
    return losses


def _join(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _carry_on(rows: dict[str, Tensor], start: int, leaves: dict[str, Tensor]) -> Tensor:
    """A scalar whose gradient in `rows` is that of `leaves`, from row `start` on; fixed keys have none."""
    terms = [
        (rows[name] * leaf.grad[start : start + len(rows[name])]).sum()
        for name, leaf in leaves.items()
        if leaf.grad is not None
    ]
    return torch.stack(terms).sum()
