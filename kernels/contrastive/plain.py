"""The ops of ops.py in PyTorch, a tile of logits at a time: for CPU tensors, and for float64.

Memory beyond inputs and results: a few tiles. Equations and letters are those of ops.py.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..launch import accumulate_dtype
from .problem import Logits, Wanted

# Side of a square tile of logits. 1024 x 1024 fp32 are 4 MiB: they stay in a CPU's cache between the passes.
_TILE = 1024


def plain_statistics(logits: Logits) -> tuple[Tensor, Tensor, Tensor]:
    """`pair_statistics`."""
    image, text, sides = logits.image, logits.text, logits.sides
    compute = accumulate_dtype(image.dtype)
    start = 0.0 if sides == "sigmoid" else -torch.inf
    row_stat = image.new_full((image.shape[0],), start, dtype=compute)
    col_stat = image.new_full((text.shape[0] if sides == "both" else 0,), start, dtype=compute)
    target = image.new_zeros((image.shape[0],), dtype=compute)
    for rows, cols, s, positive in _tiles(logits):
        if sides == "sigmoid":
            row_stat[rows] -= F.logsigmoid(-s).sum(1)  # softplus() drops exp(-20) and less
        else:
            row_stat[rows] = torch.logaddexp(row_stat[rows], s.logsumexp(1))
        if sides == "both":
            col_stat[cols] = torch.logaddexp(col_stat[cols], s.logsumexp(0))
        if positive is not None:
            weight = logits.row_weight[rows, None] + logits.col_weight[cols]
            target[rows] += (s * weight).masked_fill_(~positive, 0.0).sum(1)
    return row_stat, col_stat, target


def plain_gradients(
    logits: Logits, row_stat: Tensor, col_stat: Tensor, factor: Tensor, wanted: Wanted
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`pair_gradients`."""
    image, text, sides = logits.image, logits.text, logits.sides
    compute = accumulate_dtype(image.dtype)
    image_out = image.new_zeros((image.shape[0] if wanted.from_rows else 0, image.shape[1]), dtype=compute)
    text_out = text.new_zeros((text.shape[0] if wanted.text else 0, text.shape[1]), dtype=compute)
    bias_out = text.new_zeros((text.shape[0] if wanted.bias else 0,), dtype=compute)
    for rows, cols, s, positive in _tiles(logits):
        grad = s.sigmoid() if sides == "sigmoid" else (s - row_stat[rows, None]).exp_()
        if sides == "both":
            grad += s.sub_(col_stat[cols]).exp_()
        if positive is not None:
            grad -= (logits.row_weight[rows, None] + logits.col_weight[cols]).masked_fill_(~positive, 0.0)
        if wanted.from_rows:
            image_out[rows].addmm_(grad, text[cols].to(compute))
        if wanted.text:
            text_out[cols].addmm_(grad.T, image[rows].to(compute))
        if wanted.bias:
            bias_out[cols] += grad.sum(0)
    scale_grad = image.new_zeros((), dtype=compute)
    if wanted.scale:
        # sum_ij G_ij <I_i, T_j> = sum_i <I_i, (G T)_i> = sum_j <T_j, (G^T I)_j>
        own, products = (image, image_out) if wanted.from_rows else (text, text_out)
        scale_grad = torch.linalg.vecdot(own.to(compute), products).sum() * factor
    if not wanted.image:
        image_out = image_out[:0]
    step = logits.scale.to(compute).reshape(()) * factor
    features = image_out.mul_(step).to(image.dtype), text_out.mul_(step).to(text.dtype)
    return *features, scale_grad, bias_out.mul_(factor)


def _tiles(logits: Logits) -> Iterator[tuple[slice, slice, Tensor, Tensor | None]]:
    """Yield (rows, columns, s, positive) of every tile; positive is a bool mask, or None where it has no True.

    Logits that do not count are -inf.
    """
    image, text, offset = logits.image, logits.text, logits.offset
    compute = accumulate_dtype(image.dtype)
    num_rows, num_cols = image.shape[0], text.shape[0]
    row_code, col_code = logits.codes
    row_index = torch.arange(num_rows, device=image.device) + offset
    col_index = torch.arange(num_cols, device=image.device)
    for r in range(0, num_rows, _TILE):
        rows = slice(r, min(r + _TILE, num_rows))
        image_tile = image[rows].to(compute)
        for c in range(0, num_cols, _TILE):
            cols = slice(c, min(c + _TILE, num_cols))
            s = image_tile @ text[cols].to(compute).T
            s *= logits.scale.to(compute).reshape(())
            if logits.bias is not None:
                s += logits.bias[cols].to(compute)
            positive = None
            if rows.start + offset < cols.stop and cols.start < rows.stop + offset:
                positive = row_index[rows, None] == col_index[cols]
            if row_code is not None and col_code is not None:
                same = row_code[rows, None] == col_code[cols]
                if logits.positives == "mask":
                    s.masked_fill_(same if positive is None else same & ~positive, -torch.inf)
                else:
                    positive = same if positive is None else same | positive
            yield rows, cols, s, positive
