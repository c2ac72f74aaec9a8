"""One gradient for tokens that several calls of slot attention read: the L blocks of a decoder.

Autograd would have every call write a gradient of the tokens' size and then add it to the sum of those before: four
passes over such a tensor, where the call itself needs two, a read forward and one backward. Here the calls leave it in
factored form (ops.py). The factors flow along the graph, as gradients of `TokenPort`s, to the node
where the tokens came in, and are multiplied out there, once, when the last has come. That is plain data flow, without
state and in any order: recomputation (checkpointing), sharded parameters (FSDP2) and torch.compile see nothing special.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..launch import accumulate_dtype
from .ops import core, run_backward, save_for_backward, token_gradients
from .options import padded_queries


class TokenPort(NamedTuple):
    """Where one call leaves its part of the gradient of shared tokens, in factored form; see `share`.

    Tensors without memory of their own (zeros of stride 0): only their gradients mean anything.
    """

    coefficients: Tensor
    """(B, H, N, 2 TP)"""
    queries: Tensor
    """(B, H, T, D)"""
    grad_out: Tensor
    """(B, H, T, D)"""
    affine: Tensor
    """(B, H, N, 2) float32"""


def share(tokens: Tensor, uses: int, num_queries: int, num_heads: int) -> list[TokenPort]:
    """One port for each of `uses` calls on tokens (B, N, D), whose gradient is then written once, for all of them."""
    flat: tuple[Tensor, ...] = _Share.apply(tokens, uses, num_queries, num_heads)
    width = len(TokenPort._fields)
    return [TokenPort(*flat[i : i + width]) for i in range(0, len(flat), width)]


class _Share(torch.autograd.Function):
    """tokens to ports; backward: the factors that every port received to the gradient of the tokens."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, uses: int, num_queries: int, num_heads: int) -> tuple[Tensor, ...]:
        ctx.save_for_backward(tokens)
        ctx.set_materialize_grads(False)
        batch, num_tokens, dim = tokens.shape
        rows = (batch, num_heads, num_queries, dim)
        per_token = (batch, num_heads, num_tokens)
        shapes = ((*per_token, 2 * padded_queries(num_queries)), rows, rows, (*per_token, 2))
        zero = tokens.new_zeros(())
        zeros = [zero, zero, zero, tokens.new_zeros((), dtype=accumulate_dtype(tokens.dtype))]
        return tuple(x.expand(shape) for _ in range(uses) for x, shape in zip(zeros, shapes, strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        (tokens,) = ctx.saved_tensors
        width = len(TokenPort._fields)
        used = [grads[i : i + width] for i in range(0, len(grads), width) if grads[i] is not None]
        if not used:
            return None, None, None, None
        coefficients, queries, grad_outs, affines = (list(part) for part in zip(*used, strict=True))
        folded = [x for x in affines if x is not None]  # of the calls with a LayerNorm folded in
        affines = [torch.zeros_like(folded[0]) if x is None else x for x in affines] if folded else []
        grad = token_gradients(coefficients, queries, grad_outs, affines, tokens[:, None], "both")
        return grad[:, 0], None, None, None


class _SharedCore(torch.autograd.Function):
    """`core` in absorbed form, with the gradient of the tokens left in a port."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, tokens: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
        *_port, mask, scale, normalize, eps, norm_eps, return_map, return_entropy = rest
        ctx.token_grad = ctx.needs_input_grad[3]
        inputs = (q, tokens, None, bias, mask, scale, normalize, eps, norm_eps, return_map, return_entropy)
        output = core(*inputs)
        save_for_backward(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        grad_out, grad_q, grad_bias, coefficients, affine = run_backward(ctx, saved, grads, ctx.token_grad)
        port = (coefficients, saved[0], grad_out, affine) if ctx.token_grad else (None,) * 4
        return grad_q, None, grad_bias if ctx.needs_input_grad[2] else None, *port, *(None,) * 7


def _claim(port: TokenPort) -> None:
    """Raise ValueError if another call has the port: the sum of two calls' factors is no factor of the sum.

    A recomputation during backward is the same call. Compiled code is not checked, nor are ports that FSDP2 passed on.
    """
    if torch.compiler.is_compiling() or not port.coefficients.requires_grad or torch._C._current_graph_task_id() != -1:
        return
    if getattr(port.coefficients, "claimed", False):
        raise ValueError("this port served another call already; ask share_tokens for one per call (`uses`)")
    port.coefficients.claimed = True  # type: ignore[attr-defined]


def core_into_port(
    q: Tensor,
    tokens: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    scale: float,
    normalize: str,
    eps: float,
    norm_eps: float | None,
    return_map: bool,
    return_entropy: bool,
    port: TokenPort,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`core(q, tokens (B, 1, N, D), None, ...)`, but the gradient of the tokens goes to `port`."""
    _claim(port)
    output: tuple[Tensor, Tensor, Tensor, Tensor] = _SharedCore.apply(
        q, tokens.detach(), bias, *port, mask, scale, normalize, eps, norm_eps, return_map, return_entropy
    )
    return output
