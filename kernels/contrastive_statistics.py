"""Statistics of a matrix of logits that is never in memory, and their gradient: the two ops of the contrastive loss.

    s_ij = scale <I_i, T_j> + b_j
    row_lse_i = logsumexp_j s_ij      col_lse_j = logsumexp_i s_ij      target_i = sum_j Y_ij s_ij

    G_ij = row_grad_i exp(s_ij - row_lse_i) + col_grad_j exp(s_ij - col_lse_j) + target_grad_i Y_ij
    dI = scale G T      dT = scale G^T I      db = column sums of G      dscale = sum_i <I_i, (G T)_i>

A tile of logits gives both its row and its column sums, so the forward is a single matrix product, 2 R C D FLOP (a loss
computed once a side needs two); the backward is three. On a GPU the forward is the Triton kernel of
contrastive_kernels.py; elsewhere, and for the backward, PyTorch does the same by tiles. Results repeat bit by bit.
Sums, exponentials and statistics are fp32 for every half-precision dtype.

Letters: R rows (images), C columns (texts), D features. Both ops share these arguments: image (R, D), text (C, D);
scale of one element; bias (C,) or None; row_ids (R,) and col_ids (C,) int64 or None; row_weight (R,) and col_weight
(C,) from `positive_weights`: Y_ij is their sum at a positive, 0 elsewhere; row i is paired with column offset + i. mode
says what equal ids mean: "diagonal" (there are none), "share" (equal ids are positives), "mask" (equal ids off the pair
count nowhere).
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ._launch import accumulate_dtype, autocast_off, launches_triton
from .contrastive_kernels import triton_statistics

# Side of a square tile of logits in PyTorch. 1024 x 1024 fp32 are 4 MiB: they stay in a CPU's cache between the passes.
_TILE = {"cpu": 1024, "cuda": 8192}


def _count(ids: Tensor, among: Tensor) -> Tensor:
    """How often each of `ids` (n,) occurs in `among` (m,), in O((n + m) log m) time and linear memory."""
    among = among.sort().values
    return torch.searchsorted(among, ids, right=True) - torch.searchsorted(among, ids)


def positive_weights(
    image: Tensor, text: Tensor, ids: tuple[Tensor, Tensor, Tensor] | None, offset: int, mode: str, columns: bool
) -> tuple[Tensor, Tensor]:
    """Return 1 / n_i (R,) and 1 / n_j (C,) (zeros unless `columns`). ids: of the rows, of the rows of all ranks, and
    of the columns."""
    compute = accumulate_dtype(image.dtype)
    num_rows, num_cols = image.shape[0], text.shape[0]
    if ids is None or mode != "share":
        row_weight = image.new_ones((num_rows,), dtype=compute)
        return row_weight, image.new_full((num_cols,), float(columns), dtype=compute)
    row_ids, all_row_ids, col_ids = ids
    # The pair itself is a positive even where its two ids differ, so no row and no column is without one.
    row_count = _count(row_ids, col_ids) + (row_ids != col_ids[offset : offset + num_rows])
    if not columns:
        return row_count.to(compute).reciprocal(), image.new_zeros((num_cols,), dtype=compute)
    col_count = _count(col_ids, all_row_ids) + (col_ids != all_row_ids)
    return row_count.to(compute).reciprocal(), col_count.to(compute).reciprocal()


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
    """Yield (rows, columns, logits, positive) of every tile; positive is a bool mask, or None where it has no True."""
    side = _TILE.get(image.device.type, 1024)
    compute = accumulate_dtype(image.dtype)
    num_rows, num_cols = image.shape[0], text.shape[0]
    row_index = torch.arange(num_rows, device=image.device) + offset
    col_index = torch.arange(num_cols, device=image.device)
    for r in range(0, num_rows, side):
        rows = slice(r, min(r + side, num_rows))
        image_tile = image[rows].to(compute)
        for c in range(0, num_cols, side):
            cols = slice(c, min(c + side, num_cols))
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


def _plain_statistics(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    row_weight: Tensor,
    col_weight: Tensor,
    offset: int,
    mode: str,
    columns: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    compute = accumulate_dtype(image.dtype)
    row_lse = image.new_full((image.shape[0],), -torch.inf, dtype=compute)
    col_lse = image.new_full((text.shape[0] if columns else 0,), -torch.inf, dtype=compute)
    target = image.new_zeros((image.shape[0],), dtype=compute)
    for rows, cols, logits, positive in _tiles(image, text, scale, bias, row_ids, col_ids, offset, mode):
        row_lse[rows] = torch.logaddexp(row_lse[rows], logits.logsumexp(1))
        if columns:
            col_lse[cols] = torch.logaddexp(col_lse[cols], logits.logsumexp(0))
        if positive is not None:
            weight = row_weight[rows, None] + col_weight[cols]
            target[rows] += (logits * weight).masked_fill_(~positive, 0.0).sum(1)
    return row_lse, col_lse, target


@torch.library.custom_op("eclip::contrastive_statistics", mutates_args=())
def logit_statistics(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    row_weight: Tensor,
    col_weight: Tensor,
    offset: int,
    mode: str,
    columns: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return row_lse (R,), col_lse (C,) (empty unless `columns`) and target (R,), in fp32 or, for fp64, in fp64."""
    if image.device.type == "cpu" and not torch.isfinite(scale).all():
        raise ValueError(f"logit_scale={scale.item()} is not finite; clamp it, for example to at most 100")
    statistics = triton_statistics if launches_triton(image) else _plain_statistics
    with autocast_off(image):
        return statistics(image, text, scale, bias, row_ids, col_ids, row_weight, col_weight, offset, mode, columns)


@logit_statistics.register_fake
def _(image, text, scale, bias, row_ids, col_ids, row_weight, col_weight, offset, mode, columns):
    compute = accumulate_dtype(image.dtype)
    row_lse = image.new_empty((image.shape[0],), dtype=compute)
    return row_lse, image.new_empty((text.shape[0] if columns else 0,), dtype=compute), torch.empty_like(row_lse)


@torch.library.custom_op("eclip::contrastive_gradients", mutates_args=())
def logit_gradients(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    row_weight: Tensor,
    col_weight: Tensor,
    row_lse: Tensor,
    col_lse: Tensor,
    row_grad: Tensor,
    col_grad: Tensor,
    target_grad: Tensor,
    offset: int,
    mode: str,
    text_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return G T (R, D), G^T I (C, D) (no rows unless `text_grad`) and the column sums of G (C,), in fp32 or fp64.

    G_ij = row_grad_i exp(s_ij - row_lse_i) + col_grad_j exp(s_ij - col_lse_j) + target_grad_i Y_ij. col_lse may cover
    more rows than `image` has (the rows of all ranks); it is empty where the columns do not count.
    """
    compute = accumulate_dtype(image.dtype)
    image_out = torch.zeros_like(image, dtype=compute)
    text_out = text.new_zeros((text.shape[0] if text_grad else 0, text.shape[1]), dtype=compute)
    bias_out = text.new_zeros((text.shape[0],), dtype=compute)
    with autocast_off(image):
        for rows, cols, logits, positive in _tiles(image, text, scale, bias, row_ids, col_ids, offset, mode):
            grad = (logits - row_lse[rows, None]).exp_().mul_(row_grad[rows, None])
            if col_lse.numel():
                grad += logits.sub_(col_lse[cols]).exp_().mul_(col_grad[cols])
            if positive is not None:
                weight = row_weight[rows, None] + col_weight[cols]
                grad += weight.mul_(target_grad[rows, None]).masked_fill_(~positive, 0.0)
            image_out[rows].addmm_(grad, text[cols].to(compute))
            bias_out[cols] += grad.sum(0)
            if text_grad:
                text_out[cols].addmm_(grad.T, image[rows].to(compute))
    return image_out, text_out, bias_out


@logit_gradients.register_fake
def _(
    image, text, scale, bias, row_ids, col_ids, row_weight, col_weight, row_lse, col_lse, row_grad, col_grad,
    target_grad, offset, mode, text_grad,
):  # fmt: skip
    compute = accumulate_dtype(image.dtype)
    return (
        torch.empty_like(image, dtype=compute),
        text.new_empty((text.shape[0] if text_grad else 0, text.shape[1]), dtype=compute),
        text.new_empty((text.shape[0],), dtype=compute),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.offset, ctx.mode, _ = inputs
    ctx.save_for_backward(*tensors, output[0], output[1])


def _backward(ctx: Any, row_grad: Tensor, col_grad: Tensor, target_grad: Tensor) -> tuple[Tensor | None, ...]:
    image, text, scale, bias, *_ = ctx.saved_tensors
    needs_image, needs_text, needs_scale, needs_bias = ctx.needs_input_grad[:4]
    image_out, text_out, bias_out = logit_gradients(
        *ctx.saved_tensors, row_grad, col_grad, target_grad, ctx.offset, ctx.mode, needs_text
    )
    factor = scale.to(image_out.dtype).reshape(())
    return (
        (image_out * factor).to(image.dtype) if needs_image else None,
        (text_out * factor).to(text.dtype) if needs_text else None,
        scale_gradient(image, image_out, scale) if needs_scale else None,
        bias_out.to(bias.dtype) if needs_bias else None,
        *(None,) * 7,
    )


logit_statistics.register_autograd(_backward, setup_context=_save)


def scale_gradient(image: Tensor, image_out: Tensor, scale: Tensor) -> Tensor:
    """Gradient of the scale: sum_ij G_ij <I_i, T_j> = sum_i <I_i, (G T)_i>."""
    return (image.to(image_out.dtype) * image_out).sum().to(scale.dtype).reshape(scale.shape)
