"""Norms of the gradient by part of the model, on the device: which part learns, which one runs away.

Call `gradient_squares` after the backward pass and before gradients are clipped. Its numbers join the one all-reduce of
a step, and `to_norms` makes norms of them on the host:

    numbers = {**losses, **gradient_squares(model)}         # tensors; then means over ranks, later floats
    values = to_norms(means)                                # "grad_norm/decoder": ...
"""

import math
from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

PARTS = {
    "image_encoder": ("image_encoder",),
    "text_encoder": ("text_encoder",),
    "projections": ("image_projection", "text_projection"),
    "queries": ("queries",),
    "decoder": ("instance_decoder",),
    "heads": ("matching_head", "logit_scale"),
}
"""Which of the model's own modules and parameters belong together."""
_SQUARE, _NORM = "grad_square/", "grad_norm/"


def gradient_squares(model: nn.Module) -> dict[str, Tensor]:
    """Numbers "grad_square/PART" (), float32, whose MEAN over all ranks is the square of the part's gradient norm.

    The mean, because a step's other numbers are averaged: a sharded gradient's local square is multiplied by the number
    of its shards, and one that every rank has whole (one process, DDP) is taken as it is. Gradients must have been
    averaged over ranks already. A part without gradients, a locked one, has no number. Nothing is read by the host.
    """
    found: dict[str, list[Tensor]] = defaultdict(list)
    shards: dict[str, list[float]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            local, count = _local(parameter.grad)
            found[part_of(name)].append(local)
            shards[part_of(name)].append(count)
    squares = {}
    for part in sorted(found, key=[*PARTS, "rest"].index):
        norms = torch.stack(torch._foreach_norm([local.detach() for local in found[part]])).float()
        # As factors of Python, and not a tensor of them: that would be copied to the device, which waits.
        equal = len(set(shards[part])) == 1
        total = norms.square().sum() * shards[part][0] if equal else _weighted(norms, shards[part])
        squares[f"{_SQUARE}{part}"] = total
    return squares


def _weighted(norms: Tensor, factors: list[float]) -> Tensor:
    by_factor: dict[float, list[Tensor]] = defaultdict(list)
    for norm, factor in zip(norms.unbind(), factors, strict=True):
        by_factor[factor].append(norm)
    return torch.stack([torch.stack(rows).square().sum() * factor for factor, rows in by_factor.items()]).sum()


def _local(gradient: Tensor) -> tuple[Tensor, float]:
    """This rank's part of a gradient, and how many parts there are (copies not counted)."""
    if not isinstance(gradient, DTensor):
        return gradient, 1.0
    mesh, places = gradient.device_mesh, gradient.placements
    return gradient.to_local(), float(math.prod(mesh.size(i) for i, p in enumerate(places) if isinstance(p, Shard)))


def part_of(name: str) -> str:
    """The part of a parameter of that name; "rest" where none claims it."""
    top = name.split(".")[0]
    return next((part for part, modules in PARTS.items() if top in modules), "rest")


def to_norms(means: Mapping[str, float]) -> dict[str, float]:
    """The same numbers, means over ranks, with a norm "grad_norm/PART" for each square."""
    return {
        name.replace(_SQUARE, _NORM): math.sqrt(value) if name.startswith(_SQUARE) else value
        for name, value in means.items()
    }


def is_of_part(name: str) -> bool:
    """Whether a number is of `gradient_squares`."""
    return name.startswith(_SQUARE)
