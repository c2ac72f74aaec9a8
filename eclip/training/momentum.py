"""The momentum model: an exponential moving average (EMA) of the trained one (He et al. 2020, arXiv 1911.05722)."""

import copy
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from eclip.model.eclip import ECLIP


def make_momentum(model: ECLIP) -> ECLIP:
    """A copy of the model that no gradient reaches. Locked children are shared, not copied: they never differ."""
    shared = {id(child): child for child in model.children() if is_locked(child)}
    momentum = copy.deepcopy(model, memo=cast(dict[int, object], shared))
    return momentum.requires_grad_(False).eval()


def is_locked(module: nn.Module) -> bool:
    """True for a module whose every parameter is frozen (and that has any)."""
    parameters = list(module.parameters())
    return bool(parameters) and not any(p.requires_grad for p in parameters)


@torch.no_grad()
def update_momentum(model: nn.Module, momentum: nn.Module, decay: float) -> None:
    """momentum <- decay * momentum + (1 - decay) * model, parameter by parameter; buffers are copied.

    Under FSDP each rank moves its own shard: both models are sharded alike, so no communication is needed.
    """
    pairs = [(m, p) for m, p in zip(momentum.parameters(), model.parameters(), strict=True) if m is not p]
    if pairs:
        targets, sources = zip(*((_local(m), _local(p)) for m, p in pairs), strict=True)
        torch._foreach_lerp_(list(targets), list(sources), 1 - decay)
    for target, source in zip(momentum.buffers(), model.buffers(), strict=True):
        if target is not source:
            target.copy_(source)


def _local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
