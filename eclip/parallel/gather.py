"""The rows of every rank on every rank: all that an objective asks of the others besides its contrastive losses."""

import torch.distributed as dist
from torch import Tensor

# torch 2.13 renamed it and warns at every call of the old name; 2.11 has only that.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def gather_rows(rows: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """(B, ...) of every rank, in rank order: (G, ...). Carries no gradient."""
    rows = rows.detach().contiguous()
    if group is None or dist.get_world_size(group) == 1:
        return rows
    gathered = rows.new_empty(dist.get_world_size(group) * rows.shape[0], *rows.shape[1:])
    _all_gather(gathered, rows, group=group)
    return gathered
