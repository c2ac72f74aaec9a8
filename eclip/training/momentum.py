"""The momentum model: an exponential moving average (EMA) of the trained one (He et al. 2020, arXiv 1911.05722)."""

import copy
from typing import cast

import torch
from torch import Tensor, nn

from eclip.model.eclip import ECLIP
from eclip.parallel.sharding import local_part


def make_momentum(model: ECLIP) -> ECLIP:
    """A copy of the model that no gradient reaches. What is locked is shared, not copied: it never differs.

    Shared are whole modules (a tower, or its lower blocks and embeddings) and parameters that stand beside unlocked
    modules. FSDP2 shards a shared block once; a block that is locked in part would have to be copied.
    """
    momentum = copy.deepcopy(model, memo=cast(dict[int, object], _locked_parts(model)))
    return momentum.requires_grad_(False).eval()


def _locked_parts(module: nn.Module) -> dict[int, nn.Module | nn.Parameter]:
    """The largest locked modules, and locked parameters outside of them, by id."""
    found: dict[int, nn.Module | nn.Parameter] = {
        id(p): p for p in module.parameters(recurse=False) if not p.requires_grad
    }
    for child in module.children():
        found |= {id(child): child} if is_locked(child) else _locked_parts(child)
    return found


def is_locked(module: nn.Module) -> bool:
    """True for a module whose every parameter is frozen (and that has any)."""
    parameters = list(module.parameters())
    return bool(parameters) and not any(p.requires_grad for p in parameters)


def keep_locked_in_eval(model: nn.Module) -> None:
    """Put the locked modules of a model, however deep, in eval mode: what is trained is what inference will see."""
    for child in model.children():
        if is_locked(child):
            child.eval()
        else:
            keep_locked_in_eval(child)


@torch.no_grad()
def update_momentum(model: nn.Module, momentum: nn.Module, decay: float, finite: Tensor | None = None) -> None:
    """momentum <- decay * momentum + (1 - decay) * model, parameter by parameter, in place; buffers are copied.

    finite: 0-dim bool, the same on all ranks; where it is False no parameter moves, and the host need not know. The
    parameters themselves must be finite, as those of a skipped step are.

    Under FSDP each rank moves its own shard: both models are sharded alike, so no communication is needed.
    """
    pairs = [(m, p) for m, p in zip(momentum.parameters(), model.parameters(), strict=True) if m is not p]
    if pairs:
        targets, sources = ([local_part(tensor) for tensor in side] for side in zip(*pairs, strict=True))
        if finite is None:
            torch._foreach_lerp_(targets, sources, 1 - decay)
        else:
            # On a GPU a launch a parameter: foreach fuses weights of the parameters' own shapes alone.
            weight = finite.to(targets[0]) * (1 - decay)
            torch._foreach_lerp_(targets, sources, [weight] * len(targets))
    for target, source in zip(momentum.buffers(), model.buffers(), strict=True):
        if target is not source:
            target.copy_(source)
