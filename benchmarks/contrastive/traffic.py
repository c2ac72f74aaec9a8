"""Count the bytes that two ranks exchange in forward and backward of the contrastive loss: ours and open_clip's.

    python -m benchmarks.contrastive.traffic [--json FILE] [--batch 256] [--dim 512]

Starts two processes on the CPU, over gloo. Counted is every collective of torch.distributed, by the bytes that a rank
sends (and receives as many) in a ring, the least that a bandwidth-optimal algorithm needs; n bytes are one rank's
input, W ranks:

    all-gather (W - 1) n      reduce-scatter, all-to-all, scatter (W - 1) / W n      all-reduce 2 (W - 1) / W n

What a backend does below that is not seen: gloo scatters W times where NCCL reduce-scatters, for as many bytes.
open_clip is ClipLoss(local_loss=True, gather_with_grad=True), the setting for large batches: it gathers both towers.
Where the package is not installed, the same pattern in a few lines stands in, and the row says so.

--json writes rows that benchmarks.report reads. Their times are those of two CPU processes and say nothing.
"""

import argparse
import gc
import json
import os
import socket
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.contrastive.goals import TRAFFIC, label
from benchmarks.contrastive.peers import Loss, open_clip_losses
from eclip.kernels.contrastive import contrastive_loss

WORLD = 2
SCALE = 50.0
DTYPES = (torch.bfloat16, torch.float32)


class Traffic(TorchDispatchMode):
    """Sums what the collectives called inside it send.

    Works below the functions of torch.distributed, so it does not matter who calls them and under which name; it does
    not see into a custom operator.
    """

    def __init__(self, world_size: int) -> None:
        super().__init__()
        self.world_size = world_size
        self.sent: dict[str, float] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func._opname.strip("_")
            self.sent[name] = self.sent.get(name, 0.0) + self._bytes(name, args)
        return func(*args, **(kwargs or {}))

    def _bytes(self, name: str, args: Any) -> float:
        """Bytes that this rank sends. c10d's operators take the output first, where there is one of its own."""
        if name not in SENT:
            raise ValueError(f"the collective {name} is not counted; add it to SENT")
        position, shares = SENT[name]
        return sum(tensor.nbytes for tensor in tree_leaves(args[position])) * shares(self.world_size)


def _all_others(world_size: int) -> float:
    return world_size - 1


def _all_but_own(world_size: int) -> float:
    return (world_size - 1) / world_size


def _there_and_back(world_size: int) -> float:
    return 2 * (world_size - 1) / world_size


SENT: dict[str, tuple[int, Callable[[int], float]]] = {
    "allgather": (1, _all_others),
    "allgather_base": (1, _all_others),
    "reduce_scatter": (1, _all_but_own),
    "reduce_scatter_base": (1, _all_but_own),
    "alltoall": (1, _all_but_own),
    "alltoall_base": (1, _all_but_own),
    "scatter": (1, _all_but_own),
    "allreduce": (0, _there_and_back),
}
"""Collective -> which argument is the rank's input, and how many times its bytes are sent in a ring of W ranks."""


# --- What is compared -------------------------------------------------------------------------------------------------


def ours(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    return contrastive_loss(image, text, scale, group=dist.group.WORLD)


def open_clip(rank: int) -> tuple[Loss, str]:
    """open_clip's loss for `rank`, and where it is from."""
    try:
        losses = open_clip_losses()
    except ModuleNotFoundError:
        return _like_open_clip, "its pattern, written here: not installed"
    loss: Loss = losses.ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=WORLD)
    return loss, "ClipLoss(local_loss=True, gather_with_grad=True)"


def _like_open_clip(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    from torch.distributed.nn.functional import all_gather

    all_image, all_text = (torch.cat(all_gather(x)) for x in (image, text))
    labels = torch.arange(len(image)) + len(image) * dist.get_rank()
    by_image, by_text = scale * image @ all_text.T, scale * text @ all_image.T
    return (F.cross_entropy(by_image, labels) + F.cross_entropy(by_text, labels)) / 2


# --- Two ranks --------------------------------------------------------------------------------------------------------


def measure(loss: Loss, batch: int, dim: int, dtype: torch.dtype) -> dict[str, Any]:
    """Bytes that this rank sends in one forward and backward, by collective; and its seconds."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    image, text = (
        F.normalize(torch.randn(batch, dim, generator=generator), dim=1).to(dtype).requires_grad_() for _ in range(2)
    )
    scale = torch.tensor(SCALE, requires_grad=True)
    traffic = Traffic(WORLD)
    start = time.perf_counter()
    with traffic:
        torch.autograd.grad(loss(image, text, scale), (image, text, scale))
    seconds = time.perf_counter() - start
    return {"sent": {name: round(count) for name, count in traffic.sent.items()}, "seconds": seconds}


def _rank(rank: int, folder: str, port: int, batch: int, dim: int) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)  # names of collectives that newer versions of torch call old
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD)
    theirs, origin = open_clip(rank)
    found = []
    for dtype in DTYPES:
        for name, loss, remark in (("ours", ours, ""), ("open_clip", theirs, origin)):
            found.append({"provider": name, "remark": remark, "dtype": str(dtype).removeprefix("torch.")})
            found[-1] |= measure(loss, batch, dim, dtype)
    if rank == 0:
        Path(folder, "rows.json").write_text(json.dumps(found))
    gc.collect()  # gloo's threads end cleanly only after the last user of the group is gone
    dist.destroy_process_group()


def count(batch: int, dim: int) -> list[dict[str, Any]]:
    """A row for each loss and dtype, of rank 0; both ranks have `batch` pairs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        # Forked, since importing torch anew takes seconds; neither CUDA nor a thread of torch has started here.
        torch.multiprocessing.start_processes(_rank, args=(folder, port, batch, dim), nprocs=WORLD, start_method="fork")
        found: list[dict[str, Any]] = json.loads(Path(folder, "rows.json").read_text())
    return found


def as_benchmark(row: dict[str, Any], batch: int, dim: int) -> dict[str, Any]:
    """The row as pytest-benchmark writes one."""
    collectives = ", ".join(f"{name} {size}" for name, size in row["sent"].items())
    columns = {key: row[key] for key in ("provider", "dtype", "remark")}
    columns |= {"op": TRAFFIC, "shape": f"{WORLD} ranks, each {label(batch, dim, SCALE)}", "device": "cpu"}
    columns |= {"sent_bytes": sum(row["sent"].values()), "by collective": collectives}
    columns |= {"timing": "two CPU processes", "note": "counts bytes; the time says nothing"}
    stats = {"median": row["seconds"], "iqr": 0.0, "rounds": 1}
    return {"fullname": f"{TRAFFIC} {row['provider']} {row['dtype']}", "stats": stats, "extra_info": columns}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, help="file to write rows to, as pytest --benchmark-json does")
    parser.add_argument("--batch", type=int, default=256, help="pairs of each rank")
    parser.add_argument("--dim", type=int, default=512, help="features")
    args = parser.parse_args()
    found = count(args.batch, args.dim)
    print(f"{WORLD} ranks, each B={args.batch} D={args.dim}: bytes that a rank sends forward and backward")
    for row in found:
        total = sum(row["sent"].values())
        pieces = ", ".join(f"{name} {size}" for name, size in row["sent"].items())
        print(f"{row['dtype']:9} {row['provider']:9} {total:>10}  {pieces}  {row['remark']}")
    if args.json:
        args.json.write_text(json.dumps({"benchmarks": [as_benchmark(row, args.batch, args.dim) for row in found]}))


if __name__ == "__main__":
    main()
