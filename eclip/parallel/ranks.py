"""Ranks: process groups, threads, devices, and what a rank asks of the others on the host.

A run is started by `torchrun` (one process per device) or by plain `python` (one process, no group). On CPU the ranks
talk through gloo, on GPU through NCCL. NCCL's collectives are only enqueued by the host, which goes on at once: so host
work (files, checkpoints, the feature cache) is ordered by a gloo group beside it, and never by a device collective.
"""

import gc
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from eclip.parallel.rendezvous import meet
from eclip.parallel.signals import StopSignals
from eclip.parallel.torchrun import Place, find_place
from eclip.parallel.watch import PeerFailed, Watch

T = TypeVar("T")

# Host work of one rank may take hours; Watch, not a timeout, notices that a rank is gone.
_HOST_TIMEOUT = timedelta(days=1)


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among the others."""

    rank: int
    world_size: int
    device: torch.device
    mesh: DeviceMesh | None
    """One dimension over all ranks; None when there is one rank."""
    host_group: dist.ProcessGroup | None = None
    """gloo over all ranks, for host work: its collectives have waited when they return, also beside NCCL."""
    watch: Watch | None = None
    """Signs of life, failures and stops of the others; None when there is one rank."""
    local_rank: int = 0
    local_size: int = 1
    """This rank's number on its machine, and how many ranks are there."""

    @property
    def group(self) -> dist.ProcessGroup | None:
        return None if self.mesh is None else self.mesh.get_group()

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def with_own_host_group(self) -> "Ranks":
        """The same ranks for another thread: their host work has a group of its own. Every rank must call it."""
        if self.host_group is None:
            return self
        return replace(self, host_group=dist.new_group(backend="gloo", timeout=_HOST_TIMEOUT))

    def barrier(self) -> None:
        """Wait, on the host, until every rank is here; as long as it takes."""
        if self.host_group is not None:
            dist.barrier(group=self.host_group)

    def from_main(self, make: Callable[[], T]) -> T:
        """Let rank 0 call `make`, however long it takes; its result (pickled) on every rank.

        When `make` raises, rank 0 raises that and the others PeerFailed.
        """
        if self.host_group is None:
            return make()
        if not self.is_main:
            message: list[tuple[bool, T | None]] = [(False, None)]
            dist.broadcast_object_list(message, src=0, group=self.host_group)
            made, result = message[0]
            if not made:
                raise PeerFailed("rank 0 failed")
            return cast(T, result)
        try:
            result = make()
        except Exception:
            dist.broadcast_object_list([(False, None)], src=0, group=self.host_group)
            raise
        dist.broadcast_object_list([(True, result)], src=0, group=self.host_group)
        return result

    def gather(self, item: T) -> list[T]:
        """`item` (pickled) of every rank, in rank order, on every rank."""
        if self.host_group is None:
            return [item]
        items: list[T | None] = [None] * self.world_size
        dist.all_gather_object(items, item, group=self.host_group)
        return cast(list[T], items)

    def gather_to_main(self, item: T) -> list[T] | None:
        """`item` (pickled) of every rank, in rank order, on rank 0; None on the others."""
        if self.host_group is None:
            return [item]
        items: list[T | None] | None = [None] * self.world_size if self.is_main else None
        dist.gather_object(item, items, dst=0, group=self.host_group)
        return cast(list[T] | None, items)

    def share(self, count: int) -> range:
        """Which of `count` pieces of work, 0 to count-1, are this rank's: every world_size-th."""
        return range(self.rank, count, self.world_size)

    def highest(self, value: int) -> int:
        """The largest `value` of any rank, by the host group: nobody waits for what the device has still to do.

        Asked once a step, it takes 0.2, 0.6 and 1.8 ms among 2, 4 and 8 ranks (medians; the ranks of one machine shared
        two busy cores): a ring of 2 (ranks - 1) messages. Raises RuntimeError after the watch's limit: a rank that
        gives signs of life may stand still all the same.
        """
        if self.host_group is None:
            return value
        options, found = dist.AllreduceOptions(), torch.tensor([value])
        options.reduceOp = dist.ReduceOp(dist.ReduceOp.MAX)
        if self.watch is not None:  # the group's own limit is for host work that takes hours
            options.timeout = timedelta(seconds=self.watch.timeout)
        self.host_group.allreduce([found], options).wait()
        return int(found)

    def mean(self, values: Tensor) -> Tensor:
        """Mean of `values` over the ranks, in place. A NaN of one rank is a NaN on all."""
        if self.mesh is not None:
            dist.all_reduce(values, group=self.group)
            values /= self.world_size
        return values


ALONE = Ranks(rank=0, world_size=1, device=torch.device("cpu"), mesh=None)
"""A process without others, on the CPU or where its caller says."""


def find_ranks(*, timeout: float, stop: StopSignals | None = None) -> Watch | None:
    """Meet the ranks that the launcher announces in the environment; None for a process alone.

    timeout: seconds to wait for a silent rank, now and later. stop: learns of stop signals of other ranks, and tells
    them of its own. Raises ValueError when ranks stay away.
    """
    place = find_place()
    if place.world_size == 1:
        return None
    meeting = meet(place.rank, place.world_size, timeout=timeout)
    watch = Watch(meeting, place.rank, timeout=timeout, on_stop=stop.pass_on if stop else _ignore)
    if stop is not None:
        stop.on_request = watch.request_stop
        if stop.signum is not None:  # it came meanwhile
            watch.request_stop(stop.signum)
    return watch


def _ignore(signum: int) -> None:
    """A caller that handles no signals has nothing to be told."""


def start_ranks(watch: Watch | None) -> Ranks:
    """Pick the device and the number of threads; join the process groups of the ranks that `find_ranks` found.

    Raises ValueError when this machine has no GPU for this rank.
    """
    place = find_place()
    if "OMP_NUM_THREADS" not in os.environ:
        # Ranks that each start a thread per core are 10x slower (two ranks on two cores). torchrun itself sets 1.
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // place.local_size))
    if torch.cuda.is_available():
        device = torch.device("cuda", _gpu_of(place))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if watch is None:
        return Ranks(rank=0, world_size=1, device=device, mesh=None)
    rank, world_size = watch.rank, len(watch.members)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    limit = timedelta(seconds=watch.timeout)
    store = dist.PrefixStore("groups", watch.store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=limit)
    mesh = init_device_mesh(device.type, (world_size,), mesh_dim_names=("shard",))
    host_group = dist.new_group(backend="gloo", timeout=_HOST_TIMEOUT)
    return Ranks(
        rank=rank,
        world_size=world_size,
        device=device,
        mesh=mesh,
        host_group=host_group,
        watch=watch,
        local_rank=place.local_rank or 0,
        local_size=place.local_size,
    )


def _gpu_of(place: Place) -> int:
    """The GPU of a rank: that of its number on its machine."""
    gpus = torch.cuda.device_count()
    if place.local_rank is None and place.world_size > 1 and gpus > 1:
        raise ValueError(
            f"LOCAL_RANK is not in the environment: which of the {gpus} GPUs here is rank {place.rank}'s? start ranks "
            f"by torchrun, or set it (in Slurm: LOCAL_RANK=$SLURM_LOCALID)"
        )
    local_rank = place.local_rank or 0
    if local_rank >= gpus:
        raise ValueError(
            f"LOCAL_RANK={local_rank} in the environment, and {gpus} GPU{'s are' if gpus > 1 else ' is'} here, one for "
            f"a rank; start {gpus} a machine (torchrun --nproc-per-node={gpus}), or see CUDA_VISIBLE_DEVICES"
        )
    return local_rank


def part(ranks: Ranks) -> None:
    """Leave the ranks after work that all of them finished: wait for the last one, then leave the process groups.

    The caller must have dropped model and optimizer: gloo processes that destroy their group with FSDP modules alive
    abort at exit ("terminate called without an active exception") about two times in five.
    """
    if ranks.watch is not None:
        ranks.watch.retire()
    ranks.barrier()
    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()
