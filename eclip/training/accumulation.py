"""The losses and gradients of a whole batch from micro-batches, exactly: memory is that of a micro-batch.

Adding up the gradients of micro-batches, each with its own contrastive loss, trains on small batches: a row would meet
the few others of its micro-batch and not those of the whole one. Here a step takes two passes (GradCache, Gao et al.
2021, arXiv 2101.06983; e-CLIP's multi-stream accumulation, arXiv 2207.00208):

    1  without gradient, every part: the features that are compared, and what else other rows want of its rows (`pool`)
    2  over all ranks: the pool, the momentum model's targets, the pair losses and their gradient in the features
    3  with gradient, every part again: its local losses, and the features times that gradient; backward

It costs one more forward pass of the online towers (a quarter of a ViT-B/16 step). The momentum model runs once: its
patch tokens wait between 1 and 2 (0.3 MB a product at ViT-B/16 in bfloat16). Random draws belong to rows, and dropout
there is none: both passes see the same. Gradients are reduced over ranks after every part (parallel/sharding.py).

Letters: K parts of a rank, B rows of all of them, G of all ranks.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from eclip.parallel.gather import gather_rows
from eclip.training.metrics.spans import span
from eclip.training.step import EncodedPart, Part, TrainStep


def accumulate(
    module: TrainStep,
    call: Callable[..., Any],
    parts: Sequence[Part],
    last_backward: Callable[[bool], AbstractContextManager[object]],
    *,
    observe: bool = False,
) -> dict[str, Tensor]:
    """The losses of the parts together, as of `TrainStep.losses`; their gradients are in the parameters.

    call: `module`, or what wraps it for its ranks. last_backward: around each backward pass; told whether it is the
    step's last.
    """
    found: list[EncodedPart] = [call("encode", part) for part in parts]
    pool = _gather([f.pool for f in found], module.group)
    targets = _gather(
        [call("targets", part, f.other, pool) for part, f in zip(parts, found, strict=True)], module.group
    )
    coupled, gradients, scale_gradient = _pair_gradients(module, parts, found)
    del found  # the patch tokens of view b
    local: list[dict[str, Tensor]] = []
    start = 0
    for number, part in enumerate(parts):
        stop = start + len(part.batch.product_ids)
        own = {name: rows[start:stop] for name, rows in gradients.items()}
        with last_backward(number == len(parts) - 1):
            losses = call("rows", part, pool, targets, own, scale_gradient, 1 / len(parts), observe=observe)
            with span("backward"):
                losses.pop("total").backward()
        local.append({name: value.detach() for name, value in losses.items()})
        start = stop
    means = {name: torch.stack([losses[name] for losses in local]).mean() for name in local[0]}
    return module.objective.in_order({**coupled, **means}, parts[0].batch.step)


def _pair_gradients(
    module: TrainStep, parts: Sequence[Part], found: Sequence[EncodedPart]
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """The pair losses, and the gradient of their weighted sum in the pairs (B, D) and in the logit scale.

    Zeros where an objective's pair losses look at only some of them, or where it has none.
    """
    objective, kernels = module.objective, module.model.config.kernels
    pairs = {name: rows.requires_grad_() for name, rows in _join([f.pairs for f in found]).items()}
    scale = found[0].scale.detach().clone().requires_grad_()
    labels = _Labels(parts)
    with module.autocast():
        losses = objective.pair_losses(pairs, labels, scale=scale, kernels=kernels, group=module.group)
    inputs = [*pairs.values(), scale]
    if losses:
        total = objective.weighted_sum(losses, parts[0].batch.step)
        *gradients, scale_gradient = torch.autograd.grad(total, inputs, allow_unused=True, materialize_grads=True)
    else:
        *gradients, scale_gradient = (torch.zeros_like(x) for x in inputs)
    detached = {name: loss.detach() for name, loss in losses.items()}
    return {**detached, "logit_scale": scale.detach()}, dict(zip(pairs, gradients, strict=True)), scale_gradient


class _Labels:
    """Which of a rank's rows are alike."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.title_ids = torch.cat([part.batch.title_ids for part in parts])
        self.catalog_ids = torch.cat([part.batch.catalog_ids for part in parts])


def _gather(parts: Sequence[dict[str, Tensor]], group: dist.ProcessGroup | None) -> dict[str, Tensor]:
    """Rows (G, ...) by name of all parts of all ranks, in the order of the global batch."""
    return {name: gather_rows(rows, group) for name, rows in _join(parts).items()}


def _join(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
