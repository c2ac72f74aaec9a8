"""How a step's work is spread over the ranks, from outside the model: `spread`, then `last_backward` around each part.

    full     FSDP2: every rank keeps a part of each parameter, of its gradient and of the optimizer's state
    hybrid   FSDP2 inside each machine, a whole copy a machine: only gradients travel between machines
    none     DDP: every rank keeps everything, and gradients are averaged

Gradients are means over the ranks in each, and parameters after a step those of one process, rounding aside.
"""

import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from eclip.dataloading.system.console import say
from eclip.parallel.ranks import Ranks
from eclip.parallel.settings import ComputeConfig

# torch 2.13 renamed both; the new names are not in 2.11, which is supported too.
warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.* is deprecated", category=FutureWarning)
warnings.filterwarnings("ignore", message=".*broadcast_buffers.* is deprecated", category=FutureWarning)
# A block that returns a view is fine as long as nobody changes it in place, and nobody does.
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor", category=UserWarning)


def spread(
    root: nn.Module, ranks: Ranks, settings: ComputeConfig, *, block_dtype: torch.dtype | None = None
) -> nn.Module:
    """Spread `root`, the forward of a step, over the ranks; returns the module to call instead of it.

    Every rank must call it, with the same weights on `ranks.device` and with what does not train locked already. All of
    the step must happen inside the module's forward: several calls a step, with gradient or without, each returning
    tensors, dicts or (without gradient) anything else. block_dtype: that sharded blocks gather their parameters in
    (None: as stored).

    The optimizer is made afterwards: FSDP2 replaces the parameters. Raises ValueError where `hybrid` cannot tell the
    machines apart.
    """
    if ranks.mesh is None:
        flags = {"--shard hybrid": settings.shard == "hybrid", "--no-reshard": not settings.reshard}
        _say_idle({**flags, "--cpu-offload": settings.cpu_offload}, ranks, "one process has nothing to shard")
        return root
    if settings.shard == "none":
        # What is locked, the momentum model too, has no gradient to average; buffers never change. Each backward pass
        # uses every other parameter: a loss of weight 0 has a gradient still, of zeros.
        return DistributedDataParallel(
            root, process_group=ranks.group, broadcast_buffers=False, gradient_as_bucket_view=True
        )
    mesh = _machines(ranks) if settings.shard == "hybrid" else ranks.mesh
    offload = settings.cpu_offload and ranks.device.type != "cpu"
    if not offload:
        _say_idle({"--cpu-offload": settings.cpu_offload}, ranks, "the ranks are on CPUs, whose memory it is already")
    shard(root, mesh, block_dtype=block_dtype, reshard=settings.reshard, offload=offload)
    return root


def shard(
    root: nn.Module,
    mesh: DeviceMesh,
    *,
    block_dtype: torch.dtype | None = None,
    reshard: bool = True,
    offload: bool = False,
) -> None:
    """Shard every transformer block, then the root with what is left, over `mesh` with FSDP2; in place.

    mesh: one dimension, or two, of which the first has copies. Blocks are the members of every ModuleList named
    `blocks`. Gradients are reduced in float32 (in float64 where parameters are), averaged over ranks.

    block_dtype=bfloat16 halves what blocks gather and saves autocast's casts of their matrices, forward and backward.
    It rounds what autocast leaves alone: norms, scales, and sums of gradients in a block. Measured on the demo model
    (two ranks on CPUs, autocast emulated as a GPU has it, root mean square over eight random models): a loss of 8.5
    misses float64's by 1.9e-3, under autocast alone by 0.9e-3; the gradient by 1.6% of its length, alone by 1.2%.
    """
    double = any(p.dtype == torch.float64 for p in root.parameters())
    reduce_dtype = torch.float64 if double else torch.float32
    offload_policy = CPUOffloadPolicy() if offload else OffloadPolicy()
    # Inputs are not cast: autocast does that where it helps, and the residual stream keeps its own dtype (--residual).
    policy = MixedPrecisionPolicy(param_dtype=block_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False)
    for name, module in list(root.named_modules()):
        if isinstance(module, nn.ModuleList) and name.endswith("blocks"):
            for block in module:
                if not isinstance(block, FSDPModule):  # a momentum model shares locked ones
                    fully_shard(
                        block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard, offload_policy=offload_policy
                    )
    policy = MixedPrecisionPolicy(reduce_dtype=reduce_dtype, cast_forward_inputs=False)
    fully_shard(root, mesh=mesh, mp_policy=policy, offload_policy=offload_policy)


def last_backward(module: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Around the forward and backward pass of one of several parts of a step; `last`: of the last part.

    DDP averages after the last one alone. FSDP2 reduces inside a machine after each: the gradients of a part then take
    no more memory than a rank's share, and a parameter that is first used in the last part is no exception
    (pytorch #196996). Copies on several machines exchange after the last one alone.
    """
    if isinstance(module, DistributedDataParallel):
        return nullcontext() if last else module.no_sync()
    if isinstance(module, FSDPModule):
        module.set_requires_all_reduce(last)
    return nullcontext()


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a parameter, gradient or moment, the whole of one that is not sharded; in the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def _machines(ranks: Ranks) -> DeviceMesh:
    """Machines x ranks of a machine. `ranks.group` stays that of all."""
    assert ranks.mesh is not None
    sizes = ranks.gather((ranks.local_rank, ranks.local_size))
    size = ranks.local_size
    if any(place != (rank % size, size) for rank, place in enumerate(sizes)) or ranks.world_size % size:
        raise ValueError(
            f"--shard hybrid with ranks of (LOCAL_RANK, LOCAL_WORLD_SIZE) {', '.join(map(str, sizes[:9]))}: it needs "
            f"as many ranks on each machine, numbered machine by machine; start them by torchrun, or use --shard full"
        )
    if ranks.world_size == size:
        if ranks.is_main:
            say("--shard hybrid: there is one machine, on which it is the same as full")
        return ranks.mesh
    return init_device_mesh(ranks.device.type, (ranks.world_size // size, size), mesh_dim_names=("machine", "shard"))


def _say_idle(flags: Mapping[str, bool], ranks: Ranks, why: str) -> None:
    """flags: whether each was given."""
    for flag, given in flags.items():
        if given and ranks.is_main:
            say(f"{flag} has nothing to do: {why}")
