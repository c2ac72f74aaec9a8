"""The ops of contrastive_ops.py in PyTorch, a tile of logits at a time: for CPU tensors, and for float64.

Memory beyond inputs and results: a few tiles. Equations, letters and arguments are those of contrastive_ops.py.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ._launch import accumulate_dtype

# Side of a square tile of logits. 1024 x 1024 fp32 are 4 MiB: they stay in a CPU's cache between the passes.
_TILE = 1024


def plain_statistics(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    row_weight: Tensor,
    col_weight: Tensor,
    offset: int,
    kind: str,
    mode: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """`pair_statistics`."""
    compute = accumulate_dtype(image.dtype)
    start = 0.0 if kind == "sigmoid" else -torch.inf
    row_stat = image.new_full((image.shape[0],), start, dtype=compute)
    col_stat = image.new_full((text.shape[0] if kind == "both" else 0,), start, dtype=compute)
    target = image.new_zeros((image.shape[0],), dtype=compute)
    for rows, cols, logits, positive in _tiles(image, text, scale, bias, row_ids, col_ids, offset, mode):
        if kind == "sigmoid":
            row_stat[rows] -= F.logsigmoid(-logits).sum(1)  # softplus() drops exp(-20) and less
        else:
            row_stat[rows] = torch.logaddexp(row_stat[rows], logits.logsumexp(1))
        if kind == "both":
            col_stat[cols] = torch.logaddexp(col_stat[cols], logits.logsumexp(0))
        if positive is not None:
            weight = row_weight[rows, None] + col_weight[cols]
            target[rows] += (logits * weight).masked_fill_(~positive, 0.0).sum(1)
    return row_stat, col_stat, target


def plain_gradients(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    row_weight: Tensor,
    col_weight: Tensor,
    row_stat: Tensor,
    col_stat: Tensor,
    factor: Tensor,
    offset: int,
    kind: str,
    mode: str,
    text_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`pair_gradients`."""
    compute = accumulate_dtype(image.dtype)
    image_out = torch.zeros_like(image, dtype=compute)
    text_out = text.new_zeros((text.shape[0] if text_grad else 0, text.shape[1]), dtype=compute)
    bias_out = text.new_zeros((text.shape[0] if bias_grad else 0,), dtype=compute)
    for rows, cols, logits, positive in _tiles(image, text, scale, bias, row_ids, col_ids, offset, mode):
        grad = logits.sigmoid() if kind == "sigmoid" else (logits - row_stat[rows, None]).exp_()
        if kind == "both":
            grad += logits.sub_(col_stat[cols]).exp_()
        if positive is not None:
            grad -= (row_weight[rows, None] + col_weight[cols]).masked_fill_(~positive, 0.0)
        image_out[rows].addmm_(grad, text[cols].to(compute))
        if text_grad:
            text_out[cols].addmm_(grad.T, image[rows].to(compute))
        if bias_grad:
            bias_out[cols] += grad.sum(0)
    # sum_ij G_ij <I_i, T_j> = sum_i <I_i, (G T)_i>
    scale_grad = torch.linalg.vecdot(image.to(compute), image_out).sum() * factor
    step = scale.to(compute).reshape(()) * factor
    return (
        image_out.mul_(step).to(image.dtype),
        text_out.mul_(step).to(text.dtype),
        scale_grad,
        bias_out.mul_(factor),
    )


def _tiles(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    offset: int,
    mode: str,
) -> Iterator[tuple[slice, slice, Tensor, Tensor | None]]:
    """Yield (rows, columns, logits, positive) of every tile; positive is a bool mask, or None where it has no True.

    Columns that do not count have logits of -inf.
    """
    compute = accumulate_dtype(image.dtype)
    num_rows, num_cols = image.shape[0], text.shape[0]
    row_index = torch.arange(num_rows, device=image.device) + offset
    col_index = torch.arange(num_cols, device=image.device)
    for r in range(0, num_rows, _TILE):
        rows = slice(r, min(r + _TILE, num_rows))
        image_tile = image[rows].to(compute)
        for c in range(0, num_cols, _TILE):
            cols = slice(c, min(c + _TILE, num_cols))
            logits = image_tile @ text[cols].to(compute).T
            logits *= scale.to(compute).reshape(())
            if bias is not None:
                logits += bias[cols].to(compute)
            positive = None
            if rows.start + offset < cols.stop and cols.start < rows.stop + offset:
                positive = row_index[rows, None] == col_index[cols]
            if row_ids is not None and col_ids is not None:
                same = row_ids[rows, None] == col_ids[cols]
                if mode == "mask":
                    logits.masked_fill_(same if positive is None else same & ~positive, -torch.inf)
                else:
                    positive = same if positive is None else same | positive
            yield rows, cols, logits, positive
