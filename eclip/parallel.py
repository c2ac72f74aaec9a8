"""Ranks: process groups, threads, devices, and sharding with FSDP2 from outside the model.

A run is started by `torchrun` (one process per device) or by plain `python` (one process, no group). On CPU the ranks
talk through gloo, on GPU through NCCL.
"""

import gc
import os
import warnings
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

# torch 2.13 renamed it; the new name is not in 2.11, which is supported too.
warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.* is deprecated", category=FutureWarning)
# A block that returns a view is fine as long as nobody changes it in place, and nobody does.
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor", category=UserWarning)

# torch 2.13 renamed it and warns at every call of the old name; 2.11 has only that.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among the others."""

    rank: int
    world_size: int
    device: torch.device
    mesh: DeviceMesh | None
    """One dimension over all ranks; None when there is one rank."""

    @property
    def group(self) -> dist.ProcessGroup | None:
        return None if self.mesh is None else self.mesh.get_group()

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for every rank. An all-reduce rather than dist.barrier: NCCL's barrier guesses the device."""
        if self.mesh is not None:
            dist.all_reduce(torch.zeros(1, device=self.device), group=self.group)

    def mean(self, values: Tensor) -> Tensor:
        """Mean of `values` over the ranks, in place. A NaN of one rank is a NaN on all."""
        if self.mesh is not None:
            dist.all_reduce(values, group=self.group)
            values /= self.world_size
        return values


def start_ranks() -> Ranks:
    """Join the process group that torchrun announces, or be alone; pick the device and the number of threads."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if "OMP_NUM_THREADS" not in os.environ:
        # Ranks that each start a thread per core are 10x slower (two ranks on two cores). torchrun itself sets 1.
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size))
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    mesh = None
    if world_size > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, rank=rank, world_size=world_size)
        mesh = init_device_mesh(device.type, (world_size,), mesh_dim_names=("shard",))
    return Ranks(rank=rank, world_size=world_size, device=device, mesh=mesh)


def stop_ranks() -> None:
    """Leave the process group.

    The caller must have dropped model and optimizer: gloo processes that destroy their group with FSDP modules alive
    abort at exit ("terminate called without an active exception") about two times in five.
    """
    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()


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


def gather_rows(rows: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """(B, ...) of every rank, in rank order: (G, ...). Carries no gradient."""
    rows = rows.detach().contiguous()
    if group is None or dist.get_world_size(group) == 1:
        return rows
    gathered = rows.new_empty(dist.get_world_size(group) * rows.shape[0], *rows.shape[1:])
    _all_gather(gathered, rows, group=group)
    return gathered
