"""How the work of a step is done, applied from outside the model: `ComputeConfig` in the order of a trainer.

`spread` comes after it, then the optimizer.
"""

import torch

from eclip.config import RunConfig
from eclip.model.text_encoder import set_text_attention
from eclip.parallel.ranks import Ranks
from eclip.parallel.recompute import checkpoint_activations
from eclip.training.step import TrainStep, use_bf16


def apply_compute(module: TrainStep, config: RunConfig, ranks: Ranks) -> None:
    """Raises ValueError for text attention that does not work on the device."""
    compute, dtype = config.compute, torch.bfloat16 if use_bf16(config, ranks) else torch.float32
    set_text_attention(module, compute.text_attention, ranks.device, dtype)
    checkpoint_activations(module, compute.activation_checkpointing)
    if compute.compile:
        from eclip.parallel.compiling import compile_blocks

        compile_blocks(module)
