"""FSDP2 from outside the model: every rank keeps a part of each parameter, of its gradient and of AdamW's moments."""

import warnings

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

# torch 2.13 renamed it; the new name is not in 2.11, which is supported too.
warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.* is deprecated", category=FutureWarning)
# A block that returns a view is fine as long as nobody changes it in place, and nobody does.
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor", category=UserWarning)


def shard(root: nn.Module, mesh: DeviceMesh, *, block_dtype: torch.dtype | None = None) -> None:
    """Shard every transformer block, then the root with what is left, over `mesh` with FSDP2; in place.

    Blocks are the members of every ModuleList named `blocks`. They gather their parameters in `block_dtype` (None: as
    stored) and reduce gradients in float32, averaged over ranks. All of the step must happen inside root's forward.
    """
    # Inputs are not cast: autocast does that where it helps, and the residual stream stays in float32.
    policy = MixedPrecisionPolicy(param_dtype=block_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for name, module in list(root.named_modules()):
        if isinstance(module, nn.ModuleList) and name.endswith("blocks"):
            for block in module:
                fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(root, mesh=mesh, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False))
