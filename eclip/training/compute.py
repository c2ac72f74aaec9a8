"""How the work of a step is done (`ComputeConfig`), applied to it from outside: the model itself knows none of it.

The order matters: what is kept for the backward pass is settled before blocks are compiled, and both before FSDP takes
hold of the blocks (parallel/sharding.py). The optimizer comes last: FSDP replaces the parameters.
"""

import torch
from torch import nn

from eclip.config import RunConfig
from eclip.model.residual import set_residual_dtype
from eclip.model.text_encoder import set_text_attention
from eclip.parallel.compiling import compile_blocks
from eclip.parallel.ranks import Ranks
from eclip.parallel.recompute import checkpoint_activations
from eclip.parallel.sharding import spread
from eclip.training.step import TrainStep, use_bf16


def apply_compute(module: TrainStep, config: RunConfig, ranks: Ranks) -> tuple[nn.Module, str]:
    """Make a step compute as `config.compute` says. Returns what its ranks call instead of it, and a line about it.

    Raises ValueError for text attention that does not work on the device, and where `hybrid` cannot tell machines
    apart.
    """
    compute, bf16 = config.compute, use_bf16(config, ranks)
    kernel = set_text_attention(module, compute.text_attention, ranks.device, torch.bfloat16 if bf16 else torch.float32)
    set_residual_dtype(module, torch.bfloat16 if compute.residual == "bf16" else None)
    checkpoint_activations(module, compute.activation_checkpointing)
    if compute.compile:
        compile_blocks(module)
    called = spread(module, ranks, compute, block_dtype=torch.bfloat16 if bf16 else None)
    facts = [f"text attention {kernel}"]
    if compute.residual == "bf16":
        facts.append("residual stream bf16" if bf16 else "--residual bf16 has no effect: all is float32 here")
    if compute.activation_checkpointing != "none":
        facts.append(f"activation checkpointing {compute.activation_checkpointing}")
    if compute.compile:
        facts.append("blocks compiled")
    if ranks.world_size > 1:
        facts.append(f"shard {compute.shard}")
    return called, ", ".join(facts)
