"""Sums over a matrix of logits that is never in memory, and their gradient: the ops under the contrastive losses.

    s_ij = scale <I_i, T_j> + b_j      Y_ij = row_weight_i + col_weight_j at a positive, 0 elsewhere

    sides       row_stat_i              col_stat_j              total                       G_ij
    "both"      logsumexp_j s_ij = r_i  logsumexp_i s_ij = c_j  sum of r, c and -Y s        e^(s-r) + e^(s-c) - Y
    "rows"      logsumexp_j s_ij = r_i  (empty)                 sum of r and -Y s           e^(s-r) - Y
    "sigmoid"   sum_j softplus(s_ij)    (empty)                 sum of softplus(s), -Y s    sigmoid(s) - Y

    dI = scale G T      dT = scale G^T I      db = column sums of G      dscale = sum_i <I_i, (G T)_i>

A tile of logits gives both its row and its column sums, so the forward is a single matrix product, 2 R C D FLOP (a loss
computed once a side needs two); the backward is three, or two where the forward kept exp(s). On a GPU the work is done
by triton_forward.py and triton_backward.py, elsewhere by plain.py. Results repeat bit by bit. Sums, exponentials and
statistics are fp32 for every half-precision dtype. `pair_loss` is the loss of one process; ranks.py, that of several,
calls what `pair_total` is made of.

Letters: R rows (images), C columns (texts), D features. The ops take the fields of `Logits` one by one, as PyTorch
wants them; everything under them takes a `Logits`. problem.py says what `sides` and `positives` mean.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..launch import accumulate_dtype, autocast_off, exact_products
from .options import keeps_logits, padded_shape, takes_kernels
from .plain import plain_gradients, plain_statistics
from .problem import Logits, Wanted, find_matches, magnitudes, positive_weights, safe_shift
from .triton_backward import triton_gradients
from .triton_forward import triton_statistics


def pair_loss(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    sides: str,
    positives: str,
    keep_bytes: int = 0,
) -> Tensor:
    """The total per pair (and side) of one process, whose rows are paired with the first columns.

    keep_bytes: as in `contrastive_loss`, 0 where no gradient is wanted.
    """
    matches = None if image_ids is None or text_ids is None else find_matches(image_ids, text_ids, positives)
    weights = positive_weights(image, text.shape[0], matches, 0, sides, positives)
    keep = keeps_logits(image, text.shape[0], sides, keep_bytes)
    total = pair_total(image, text, scale, bias, *(matches or (None, None)), *weights, sides, positives, keep)[0]
    return total / num_terms(image.shape[0], sides)


def num_terms(pairs: int, sides: str) -> int:
    """What a total over so many pairs is divided by."""
    return 2 * pairs if sides == "both" else pairs


def pair_statistics(logits: Logits, kept: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return row_stat (R,), col_stat (C,) (empty but for "both") and target (R,), target_i = sum_j Y_ij s_ij.

    kept: bf16 of the `padded_shape` of (R, C), is filled with exp(s - shift); None where `keeps_logits` says no.
    """
    with torch.no_grad():
        found: tuple[Tensor, Tensor, Tensor] = _pair_statistics(*logits, kept)
    return found


def _statistics(logits: Logits, kept: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    image, scale = logits.image, logits.scale
    if image.device.type == "cpu" and not torch.isfinite(scale).all():
        raise ValueError(f"logit_scale={scale.item()} is not finite; clamp it, for example to at most 100")
    with torch.no_grad(), autocast_off(image), exact_products(image):
        return triton_statistics(logits, kept) if takes_kernels(image) else plain_statistics(logits)


@torch.library.custom_op("eclip::pair_statistics", mutates_args=("kept",))
def _pair_statistics(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    row_match: Tensor | None,
    col_match: Tensor | None,
    row_weight: Tensor,
    col_weight: Tensor,
    shift: Tensor,
    offset: int,
    sides: str,
    positives: str,
    kept: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """For ranks.py: an op, so that a FLOP counter sees the product in it."""
    logits = Logits(
        image, text, scale, bias, row_match, col_match, row_weight, col_weight, shift, offset, sides, positives
    )
    return _statistics(logits, kept)


@_pair_statistics.register_fake
def _(
    image, text, scale, bias, row_match, col_match, row_weight, col_weight, shift, offset, sides, positives, kept,
):  # fmt: skip
    compute = accumulate_dtype(image.dtype)
    return (
        image.new_empty((image.shape[0],), dtype=compute),
        image.new_empty((text.shape[0] if sides == "both" else 0,), dtype=compute),
        image.new_empty((image.shape[0],), dtype=compute),
    )


def loss_terms(row_stat: Tensor, col_stat: Tensor, target: Tensor, sides: str) -> Tensor:
    """(R,) share of each row in the total; col_stat (R,): of the columns that the rows are paired with."""
    # Subtract before summing: the terms are small differences of large numbers.
    return row_stat + col_stat - target if sides == "both" else row_stat - target


@torch.library.custom_op("eclip::pair_total", mutates_args=())
def pair_total(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    row_match: Tensor | None,
    col_match: Tensor | None,
    row_weight: Tensor,
    col_weight: Tensor,
    sides: str,
    positives: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return total (), row_stat, col_stat, shift (1,) and kept (bf16, (0, 0) unless `keep`).

    Rows are paired with the first R columns. Differentiable in image, text, scale and bias through `total` alone.
    """
    shift = safe_shift(magnitudes(image, text, bias), scale, sides)
    kept = _memory_to_keep(image, text, keep)
    logits = Logits(image, text, scale, bias, row_match, col_match, row_weight, col_weight, shift, 0, sides, positives)
    row_stat, col_stat, target = _statistics(logits, kept if keep else None)
    return loss_terms(row_stat, col_stat, target, sides).sum(), row_stat, col_stat, shift, kept


def _memory_to_keep(image: Tensor, text: Tensor, keep: bool) -> Tensor:
    shape = padded_shape(image.shape[0], text.shape[0]) if keep else (0, 0)
    return image.new_empty(shape, dtype=torch.bfloat16)


@pair_total.register_fake
def _(image, text, scale, bias, row_match, col_match, row_weight, col_weight, sides, positives, keep):
    compute = accumulate_dtype(image.dtype)
    return (
        image.new_empty((), dtype=compute),
        image.new_empty((image.shape[0],), dtype=compute),
        image.new_empty((text.shape[0] if sides == "both" else 0,), dtype=compute),
        image.new_empty((1,), dtype=compute),
        _memory_to_keep(image, text, keep),
    )


@torch.library.custom_op("eclip::pair_gradients", mutates_args=())
def pair_gradients(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    row_match: Tensor | None,
    col_match: Tensor | None,
    row_weight: Tensor,
    col_weight: Tensor,
    row_stat: Tensor,
    col_stat: Tensor,
    shift: Tensor,
    kept: Tensor | None,
    factor: Tensor,
    offset: int,
    sides: str,
    positives: str,
    image_grad: bool,
    text_grad: bool,
    scale_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return factor times the gradients of the total: image (R, D), text (C, D), scale () and bias (C,).

    The first two are in the features' dtype, the others in the statistics'. What is not asked for has no rows, the
    scale's is 0, and the products for it are left out. factor (): the gradient of the total. col_stat may cover more
    rows than `image` has (the rows of all ranks).
    """
    logits = Logits(
        image, text, scale, bias, row_match, col_match, row_weight, col_weight, shift, offset, sides, positives
    )
    wanted = Wanted(image_grad, text_grad, scale_grad, bias_grad)
    with autocast_off(image), exact_products(image):
        if takes_kernels(image):
            return triton_gradients(logits, row_stat, col_stat, kept, factor, wanted)
        return plain_gradients(logits, row_stat, col_stat, factor, wanted)


@pair_gradients.register_fake
def _(
    image, text, scale, bias, row_match, col_match, row_weight, col_weight, row_stat, col_stat, shift, kept, factor,
    offset, sides, positives, image_grad, text_grad, scale_grad, bias_grad,
):  # fmt: skip
    compute = accumulate_dtype(image.dtype)
    return (
        image.new_empty((image.shape[0] if image_grad else 0, image.shape[1])),
        text.new_empty((text.shape[0] if text_grad else 0, text.shape[1])),
        image.new_empty((), dtype=compute),
        text.new_empty((text.shape[0] if bias_grad else 0,), dtype=compute),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.sides, ctx.positives, ctx.keep = inputs
    # Else autograd makes a zero gradient for every other output: for `kept` 2 GiB at B = 32768, in each backward.
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*tensors, *output[1:])


def _backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 11
    *arguments, kept = ctx.saved_tensors
    scale, bias = arguments[2:4]
    wanted = Wanted(*ctx.needs_input_grad[:4])
    image_grad, text_grad, scale_grad, bias_grad = pair_gradients(
        *arguments, kept if ctx.keep else None, grad, 0, ctx.sides, ctx.positives, *wanted
    )
    return (
        image_grad if wanted.image else None,
        text_grad if wanted.text else None,
        scale_grad.to(scale.dtype).reshape(scale.shape) if wanted.scale else None,
        bias_grad.to(bias.dtype) if wanted.bias else None,
        *(None,) * 7,
    )


pair_total.register_autograd(_backward, setup_context=_save)


# --- FLOPs, for torch.utils.flop_counter: of the matrix products that the mathematics asks for, 2 R C D each. The
# logits that the backward computes again are no more than that. Arguments are shapes. ----------------------------


@register_flop_formula([torch.ops.eclip.pair_total, torch.ops.eclip.pair_statistics])
def _logits_flops(image: torch.Size, text: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * image[0] * text[0] * image[1]


@register_flop_formula(torch.ops.eclip.pair_gradients)
def _gradient_flops(image: torch.Size, text: torch.Size, *rest: Any, **_: Any) -> int:
    image_grad, text_grad, *_others = rest[-4:]
    return (image_grad + text_grad) * _logits_flops(image, text)
