"""The ops under both forms of slot attention: their contract, registration and gradients.

    out, mass, map, entropy = core(q (B, H, T, D), k (B, G, N, D), v like k or None, bias (B, H, T), mask (B, T), ...)

v = None: the values are the keys (the absorbed form, where both are the raw tokens). norm_eps, with v = None alone: the
tokens pass through a LayerNorm without affine part first. out is (B, H, T, D); mass (B, H, T) is s, each query's sum of
A; map is A, (B, H, T, N); entropy (B, H) is the sum over tokens of -sum_t A ln A. Map and entropy are empty unless
asked for. The gradients reach q, k, v and bias through all four, so that whatever is built on them (sum_n W from the
mass, a loss on the map) needs no code here. __init__.py explains the letters.

Backward has two ops. `core_backward` recomputes the map and leaves the tokens' gradient in factored form,

    dE_n = sum_t C1_nt q_t + C2_nt dout_t      C1 = scale dS, C2 = W, both times 1/std of the token under norm_eps

as `coefficients` (B, H, N, 2 TP): C1 in the first T columns, C2 from column TP on, zeros between (`padded_queries`).
`token_gradients` multiplies the factors out, for one call or for all that share the tokens (ports.py), each of which
then writes 2 TP numbers a token instead of D. `affine` (B, H, N, 2) adds offset + slope * E to dE: what the mean and
the variance of a LayerNorm take from it.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..launch import accumulate_dtype, launches_triton
from .backward import triton_backward, triton_token_gradients
from .forward import triton_forward
from .options import padded_queries, supported
from .plain import plain_backward, plain_forward, plain_token_gradients

# --- Operators: only these know which implementation runs -------------------------------------------------------------


def _takes_kernels(q: Tensor) -> bool:
    """Whether queries (B, H, T, D) and all that belongs to them go to the kernels, or to PyTorch (plain.py)."""
    return launches_triton(q) and supported(q.dtype, *q.shape[-2:]) is None


@torch.library.custom_op("eclip::slot_attention", mutates_args=())
def core(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    scale: float,
    normalize: str,
    eps: float,
    norm_eps: float | None,
    return_map: bool,
    return_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    forward = triton_forward if _takes_kernels(q) else plain_forward
    return forward(q, k, v, bias, mask, scale, normalize, eps, norm_eps, return_map, return_entropy)


@core.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    scale: float,
    normalize: str,
    eps: float,
    norm_eps: float | None,
    return_map: bool,
    return_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    values = k if v is None else v
    dtype = accumulate_dtype(q.dtype)
    return (
        q.new_empty(*q.shape[:3], values.shape[-1]),
        q.new_empty(q.shape[:3], dtype=dtype),
        q.new_empty((*q.shape[:3], k.shape[2]) if return_map else (0,), dtype=dtype),
        q.new_empty(q.shape[:2] if return_entropy else (0,), dtype=dtype),
    )


@torch.library.custom_op("eclip::slot_attention_backward", mutates_args=())
def core_backward(
    grad_out: Tensor,
    grad_mass: Tensor | None,
    grad_map: Tensor | None,
    grad_entropy: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    mass: Tensor,
    out: Tensor,
    scale: float,
    normalize: str,
    eps: float,
    norm_eps: float | None,
    token_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q and bias, coefficients, affine; empty tensors for what does not exist or was not asked for."""
    backward = triton_backward if _takes_kernels(q) else plain_backward
    return backward(
        grad_out,
        grad_mass,
        grad_map,
        grad_entropy,
        q,
        k,
        v,
        bias,
        mask,
        mass,
        out,
        scale,
        normalize,
        eps,
        norm_eps,
        token_grad,
    )


@core_backward.register_fake
def _(
    grad_out: Tensor,
    grad_mass: Tensor | None,
    grad_map: Tensor | None,
    grad_entropy: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    mass: Tensor,
    out: Tensor,
    scale: float,
    normalize: str,
    eps: float,
    norm_eps: float | None,
    token_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, heads, num_queries, _ = q.shape
    num_tokens = k.shape[2]
    return (
        q.new_empty(q.shape),
        mass.new_empty(bias.shape if bias is not None else (0,)),
        q.new_empty((batch, heads, num_tokens, 2 * padded_queries(num_queries)) if token_grad else (0,)),
        mass.new_empty((batch, heads, num_tokens, 2) if token_grad and norm_eps is not None else (0,)),
    )


@torch.library.custom_op("eclip::slot_attention_token_gradients", mutates_args=())
def token_gradients(
    coefficients: list[Tensor],
    queries: list[Tensor],
    grad_outs: list[Tensor],
    affines: list[Tensor],
    tokens: Tensor,
    which: str,
) -> Tensor:
    """dE like `tokens` (B, G, N, D), summed over the list and over the heads of a group.

    which: "both" products, or that with the "queries" (keys' gradient) or the "grad_outs" (values') alone.
    """
    product = triton_token_gradients if _takes_kernels(queries[0]) else plain_token_gradients
    return product(coefficients, queries, grad_outs, affines, tokens, which)


@token_gradients.register_fake
def _(
    coefficients: list[Tensor],
    queries: list[Tensor],
    grad_outs: list[Tensor],
    affines: list[Tensor],
    tokens: Tensor,
    which: str,
) -> Tensor:
    return tokens.new_empty(tokens.shape)


# --- Autograd of one call ---------------------------------------------------------------------------------------------


def save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, bias, mask, *options, return_map, return_entropy = inputs
    ctx.save_for_backward(q, k, v, bias, mask, output[1], output[0])
    ctx.options = options
    ctx.returned = (return_map, return_entropy)
    ctx.set_materialize_grads(False)


def run_backward(
    ctx: Any, saved: tuple[Tensor, ...], grads: tuple[Tensor | None, ...], token_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """grad_out, without which the factors are not complete, and what `core_backward` returns; affine may be None."""
    grad_out, grad_mass, *grad_extras = grads
    grad_out = torch.zeros_like(saved[-1]) if grad_out is None else grad_out
    extras = (x if asked else None for x, asked in zip(grad_extras, ctx.returned, strict=True))
    *found, affine = core_backward(grad_out, grad_mass, *extras, *saved, *ctx.options, token_grad)
    norm_eps = ctx.options[-1]
    return grad_out, *found, None if norm_eps is None else affine


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # read once: checkpointing recomputes them then, and refuses a second time
    q, k, v, *_ = saved
    wants_q, wants_k, wants_v, wants_bias, *_ = ctx.needs_input_grad
    grad_out, grad_q, grad_bias, coefficients, affine = run_backward(ctx, saved, grads, wants_k or wants_v)
    factors = [coefficients], [q], [grad_out], [] if affine is None else [affine]
    grad_k = token_gradients(*factors, k, "both" if v is None else "queries") if wants_k else None
    grad_v = token_gradients(*factors, v, "grad_outs") if wants_v else None
    return grad_q if wants_q else None, grad_k, grad_v, grad_bias if wants_bias else None, *(None,) * 7


core.register_autograd(_backward, setup_context=save_for_backward)


# --- FLOPs, for torch.utils.flop_counter: of the matrix products that the mathematics asks for. The scores that
# `core_backward` computes again are no more than that. Arguments are shapes. ---------------------------------------


def _product_flops(q: torch.Size, width: int, num_tokens: int) -> int:
    """Of (T, N) with (N, width), or of the same three lengths in another order, for all images and heads."""
    batch, heads, num_queries, _ = q
    return 2 * batch * heads * num_queries * num_tokens * width


@register_flop_formula(torch.ops.eclip.slot_attention)
def _core_flops(q: torch.Size, k: torch.Size, v: torch.Size | None, *_: Any, **__: Any) -> int:
    """Scores and out."""
    return _product_flops(q, q[-1] + (k if v is None else v)[-1], k[2])


@register_flop_formula(torch.ops.eclip.slot_attention_backward)
def _core_backward_flops(
    grad_out: torch.Size,
    grad_mass: Any,
    grad_map: Any,
    grad_entropy: Any,
    q: torch.Size,
    k: torch.Size,
    *_: Any,
    **__: Any,
) -> int:
    """dW and dq."""
    return _product_flops(q, grad_out[-1] + q[-1], k[2])


@register_flop_formula(torch.ops.eclip.slot_attention_token_gradients)
def _token_gradient_flops(
    coefficients: list[torch.Size],
    queries: list[torch.Size],
    grad_outs: list[torch.Size],
    affines: list[torch.Size],
    tokens: torch.Size,
    which: str,
    **_: Any,
) -> int:
    """dS^T q and W^T dO, or one of them."""
    rows = {"both": [*queries, *grad_outs], "queries": queries, "grad_outs": grad_outs}[which]
    return sum(_product_flops(shape, shape[-1], tokens[2]) for shape in rows)
