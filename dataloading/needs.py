"""What a loader will take of the machine's memory, told before it starts: nothing is allocated here.

Workers pass images through anonymous shared memory (system/workers.py), which is no part of /dev/shm and does not end
where that ends, but counts to the machine's and the container's memory like any other, once it was written to.
"""

from dataclasses import dataclass
from typing import Literal

from .pipeline import PREFETCH, image_bytes
from .system.memory import available_memory

MIB = 1 << 20
# Measured as proportional set sizes (2 cores, 320 px JPEGs to 224 px, parts of 32 to 256 products).
_WORKER = 30 * MIB  # of a worker beside its images
_DALI, _DALI_BATCHES = 200 * MIB, 4  # DALI with its threads, and what it holds, in batches of decoded images


@dataclass(frozen=True)
class Needs:
    """Bytes of host memory that one loader takes beyond its index."""

    shared_bytes: int
    """Anonymous memory that workers share with the training process."""
    private_bytes: int
    """Of the training process and of each worker alone."""

    @property
    def host_bytes(self) -> int:
        """All of it."""
        return self.shared_bytes + self.private_bytes


def loader_needs(
    part_rows: int,
    image_size: int,
    num_workers: int,
    decoder: Literal["dali", "torch", "none"],
    *,
    held: int = 2,
    on_gpu: bool = False,
) -> Needs:
    """Of one rank's loader, at its largest.

    part_rows: products of the largest batch (`Parts.most_rows`). decoder: as `choose_decoder` says. held: batches that
    the caller has at a time, and the next one. on_gpu: batches are pinned, and DALI's images are on the GPU.
    """
    batch = part_rows * image_bytes(image_size)
    # torch gives pinned memory in powers of two
    kept = 1 << (batch - 1).bit_length() if on_gpu else batch
    if decoder == "none":
        return Needs(0, 0)
    if decoder == "dali":
        return Needs(0, _DALI + (0 if on_gpu else (_DALI_BATCHES + PREFETCH + held) * batch))
    if num_workers:
        return Needs(num_workers * PREFETCH * batch, num_workers * _WORKER + (1 + held) * kept)
    return Needs(0, (PREFETCH + 1 + held) * kept)


def require_memory(needs: Needs, *, loaders: int = 1, available: int | None = None) -> None:
    """Raise ValueError where so many loaders (ranks of this machine) find too little memory.

    available: bytes, None asks the system; what the system does not say is enough.
    """
    left = available_memory() if available is None else available
    wanted = loaders * needs.host_bytes
    if left is None or wanted <= left:
        return
    of = "the loader" if loaders == 1 else f"the loaders of {loaders} ranks on this machine"
    raise ValueError(
        f"{of} would take {wanted / 1e9:.1f} GB of memory for batches ({loaders * needs.shared_bytes / 1e9:.1f} GB of "
        f"it shared with their workers), {left / 1e9:.1f} GB are available here; use fewer --num-workers, or a smaller "
        f"--micro-batch or --global-batch-size"
    )
