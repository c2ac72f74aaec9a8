"""Activation checkpointing from outside the model: what is computed again in the backward pass instead of being kept.

    blocks      of each transformer block its inputs alone are kept: one more forward pass
    selective   the results of linear layers and attention are kept too; norms, activations, residual sums, casts and
                products of attention scores are computed again, which no GPU has to work hard for

Names of parameters and modules stay, and so do results: what is computed twice is the same twice. Under autocast,
`selective` sums a weight's gradients of several passes in float32, where they are otherwise summed in bfloat16.
"""

from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

LINEAR = ("aten::mm", "aten::addmm")
"""Products with a weight. Not bmm: it makes scores of every pair of tokens where attention is not one op."""
FUSED = ("aten::_scaled_dot_product_", "eclip::", "torch_attn::", "xformers")
"""How attention's names begin: PyTorch's, ours, PyTorch's of ragged text, xformers'."""


def checkpoint_activations(root: nn.Module, mode: str) -> int:
    """Keep less of every block that trains, for `mode` "blocks" or "selective" ("none": all is kept); in place.

    Blocks are the members of every ModuleList named `blocks`. They must draw no random numbers: no state of a generator
    is kept for the second pass. Call it before blocks are compiled and sharded; copies made before it or after have
    what they copy. Returns how many blocks it reached.
    """
    if mode == "none":
        return 0
    forward = {"blocks": _recomputed, "selective": _recomputed_but_products}[mode]
    reached = 0
    for name, module in list(root.named_modules()):
        if isinstance(module, nn.ModuleList) and name.endswith("blocks"):
            for block in module:
                assert "forward" not in vars(block), f"{name}: a block's forward was replaced already"
                if any(p.requires_grad for p in block.parameters()):
                    # A bound method: copy.deepcopy binds it to the copy.
                    block.forward = MethodType(forward, block)
                    reached += 1
    return reached


def _recomputed(block: nn.Module, *inputs: Any, **options: Any) -> Any:
    # FSDP2 and the like derive a class from the block's; forward is looked up when it is called.
    forward = partial(type(block).forward, block)
    if not torch.is_grad_enabled():
        return forward(*inputs, **options)
    return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False, **options)


def _recomputed_but_products(block: nn.Module, *inputs: Any, **options: Any) -> Any:
    forward = partial(type(block).forward, block)
    if not torch.is_grad_enabled():
        return forward(*inputs, **options)
    contexts = partial(create_selective_checkpoint_contexts, _policy)
    if torch.compiler.is_compiling():
        return checkpoint(
            forward, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts, **options
        )
    # What is kept is found again by counting calls. Autocast's cache would spare the casts of weights in a forward pass
    # that is not the step's first, but not in the second computation.
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        return checkpoint(
            forward, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts, **options
        )
    finally:
        torch.set_autocast_cache_enabled(cached)


def _policy(context: Any, op: Any, *inputs: Any, **options: Any) -> CheckpointPolicy:
    name = op.name().split(".")[0]
    if name in LINEAR or name.startswith(FUSED):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
