"""The launchers of slot attention's two backward kernels.

`triton_backward` (kernel in backward_scores.py) gives the gradients of queries and bias and the factors of the tokens'
gradient; `triton_token_gradients` (kernel in backward_tokens.py) multiplies the factors out.
"""

import torch
import triton
from torch import Tensor

from .. import launch
from ..launch import on_device_of, readable
from .backward_scores import slot_attention_bwd_kernel
from .backward_tokens import slot_attention_token_gradient_kernel
from .options import ENOUGH_PROGRAMS, scores_options, tokens_options


def triton_backward(
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
    """`core_backward` (ops.py) on a GPU, or interpreted."""
    batch, heads, num_queries, dim = q.shape
    groups, num_tokens = k.shape[1:3]
    options = scores_options(
        num_queries,
        num_tokens,
        dim,
        q.dtype,
        separate=v is not None,
        norm=norm_eps is not None,
        extras=normalize == "mean" or any(x is not None for x in (bias, grad_mass, grad_entropy)),
        grad_map=grad_map is not None,
        generation=launch.gpu_generation(q),
    )
    blocks = triton.cdiv(num_tokens, options["BLOCK_N"])
    # Several blocks of tokens: the program of an image goes through them, if that makes programs enough for the GPU.
    # Else each block is a program and writes its part of the sums, which are then added in a fixed order.
    split = blocks > 1 and batch * heads < ENOUGH_PROGRAMS
    parts = blocks if split else 1
    grad_q = q.new_empty(parts, *q.shape, dtype=torch.float32 if split else q.dtype)
    sums = q.new_empty(q.shape, dtype=torch.float32) if blocks > 1 and not split else None
    grad_bias = None if bias is None else mass.new_empty(parts, *mass.shape)
    coefficients = affine = None
    if token_grad:
        coefficients = q.new_empty(batch, heads, num_tokens, 2 * options["BLOCK_T"])
        if norm_eps is not None:
            affine = mass.new_empty(batch, heads, num_tokens, 2)
    if batch > 0:
        q, k, grad_out = (readable(x) for x in (q, k, grad_out))
        v = v if v is None else readable(v)
        mass, out = mass.contiguous(), out.contiguous()
        grad_mass, grad_entropy, bias, mask = (
            x if x is None else x.contiguous() for x in (grad_mass, grad_entropy, bias, mask)
        )
        mask = mask if mask is None else mask.view(torch.uint8)
        with on_device_of(q):
            slot_attention_bwd_kernel[(batch * heads * parts,)](
                *(q, k, v, grad_out, out, mass, bias, mask, grad_mass, grad_map, grad_entropy),
                *(grad_q, sums, grad_bias, coefficients, affine),
                *q.stride()[:3],
                *k.stride()[:3],
                *(k if v is None else v).stride()[:3],
                *grad_out.stride()[:3],
                *((0, 0, 0, 0) if grad_map is None else grad_map.stride()),
                *(heads, heads // groups, num_queries, num_tokens, dim, scale, eps, norm_eps or 0.0),
                NORMALIZE=normalize,
                HAS_NORM=norm_eps is not None,
                SPLIT=split,
                **options,
            )
    return (
        _sum_blocks(grad_q).to(q.dtype),
        mass.new_empty(0) if grad_bias is None else _sum_blocks(grad_bias),
        q.new_empty(0) if coefficients is None else coefficients,
        mass.new_empty(0) if affine is None else affine,
    )


def _sum_blocks(partials: Tensor) -> Tensor:
    return partials[0] if partials.shape[0] == 1 else partials.sum(0)


def triton_token_gradients(
    coefficients: list[Tensor],
    queries: list[Tensor],
    grad_outs: list[Tensor],
    affines: list[Tensor],
    tokens: Tensor,
    which: str,
) -> Tensor:
    """`token_gradients` (ops.py) on a GPU, or interpreted."""
    batch, groups, num_tokens, dim = tokens.shape
    heads, num_queries = queries[0].shape[1:3]
    grad = tokens.new_empty(tokens.shape)
    if batch == 0:
        return grad
    one_entry = len(coefficients) == 1 and heads == groups
    padded = coefficients[0].shape[-1] // 2
    options = tokens_options(padded, num_tokens, dim, tokens.dtype, one_entry=one_entry, norm=bool(affines))
    queries, grad_outs = _same_strides(queries), _same_strides(grad_outs)
    tokens = readable(tokens)
    chunks = triton.cdiv(dim, options["BLOCK_D"])
    programs = batch * groups * triton.cdiv(num_tokens, options["BLOCK_N"])
    chunks_per_program = triton.cdiv(chunks, min(chunks, triton.cdiv(ENOUGH_PROGRAMS, programs)))
    with on_device_of(tokens):
        slot_attention_token_gradient_kernel[(programs * triton.cdiv(chunks, chunks_per_program),)](
            tuple(x.contiguous() for x in coefficients),
            tuple(queries),
            tuple(grad_outs),
            tuple(x.contiguous() for x in affines) or None,
            tokens,
            grad,
            *queries[0].stride()[:3],
            *grad_outs[0].stride()[:3],
            *tokens.stride()[:3],
            groups,
            heads // groups,
            num_queries,
            num_tokens,
            dim,
            chunks_per_program,
            WITH_QUERIES=which in ("both", "queries"),
            WITH_GRAD_OUTS=which in ("both", "grad_outs"),
            **options,
        )
    return grad


def _same_strides(tensors: list[Tensor]) -> list[Tensor]:
    """The kernel takes one set of strides for all calls, which differ only when something unusual made the tensors."""
    tensors = [readable(x) for x in tensors]
    alike = all(x.stride() == tensors[0].stride() for x in tensors)
    return tensors if alike else [x.contiguous() for x in tensors]
