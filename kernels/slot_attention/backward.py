"""The launcher of slot attention's backward kernels: what slot_attention_core.py calls for tensors on a GPU.

`triton_backward` (slot_attention_score_gradient.py) gives the gradients of queries and bias and the factors of the
tokens' gradient; `triton_token_gradients` (slot_attention_token_gradient.py) multiplies the factors out.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from .. import launch
from ..launch import on_device_of, readable
from .backward_scores import slot_attention_bwd_kernel
from .backward_tokens import ENOUGH_PROGRAMS, triton_token_gradients
from .plain import padded_queries

__all__ = ["triton_backward", "triton_token_gradients"]


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
    batch, heads, num_queries, dim = q.shape
    groups, num_tokens = k.shape[1:3]
    options = _launch_options(
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
        with on_device_of(q):
            slot_attention_bwd_kernel[(batch * heads * parts,)](
                q,
                k,
                v,
                grad_out,
                out,
                mass,
                bias,
                mask if mask is None else mask.view(torch.uint8),
                grad_mass,
                grad_map,
                grad_entropy,
                grad_q,
                sums,
                grad_bias,
                coefficients,
                affine,
                *q.stride()[:3],
                *k.stride()[:3],
                *(k if v is None else v).stride()[:3],
                *grad_out.stride()[:3],
                *((0, 0, 0, 0) if grad_map is None else grad_map.stride()),
                heads,
                heads // groups,
                num_queries,
                num_tokens,
                dim,
                scale,
                eps,
                norm_eps or 0.0,
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


def _launch_options(
    num_queries: int,
    num_tokens: int,
    dim: int,
    dtype: torch.dtype,
    *,
    separate: bool,
    norm: bool,
    extras: bool,
    grad_map: bool,
    generation: int,
) -> dict[str, Any]:
    """Blocks, warps and stages for a GPU of compute capability `generation`.x.

    The scores of a block lie in registers. One block that holds all tokens of an image needs neither `out` nor partial
    sums, so blocks are as large as was found to compile without a spill: larger on Hopper, whose products take their
    operands from shared memory. extras: bias, `mean`, gradients of mass or entropy. Hopper, T = 20, N = 196: one block,
    unless the map has a gradient; a program fills a multiprocessor, with three chunks of channels on the way.
    """
    hopper, blackwell = generation == 9, generation >= 10
    block_t = padded_queries(num_queries)
    block_d = min(64, max(16, triton.next_power_of_2(dim)))
    plain = not (norm or extras or grad_map)
    scores = 8192  # tokens x queries of a block
    if grad_map or (num_tokens * block_t > scores and (norm or not hopper)) or (separate and not hopper):
        scores = 4096
    if block_t == 64:
        scores = 4096 if (plain and not separate) or (hopper and not grad_map) else 2048
        block_d = block_d if scores == 4096 else min(block_d, 32)
    elif (plain and block_t == 16 and not hopper) or (not plain and (blackwell or (norm and grad_map and not hopper))):
        scores = 2048
    if dim % 16:  # rows without alignment: an address per channel
        scores, block_d = min(scores, 2048), 16
    elif (norm or grad_map) and (dim % block_d or dim <= 16):
        scores //= 2
    smallest = 32 if block_t == 64 else 64
    block_n = max(smallest, min(triton.next_power_of_2(num_tokens), 256, scores // block_t))
    warps = 8
    if dtype == torch.float32:  # at full precision the tensor cores are out, and operands sit in registers
        block_n, block_d, warps = 32, 16, 4 if block_t == 16 else 8
    options = {
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
        "BLOCK_T": block_t,
        "BLOCK_N": block_n,
        "BLOCK_D": block_d,
        "ONE_BLOCK": num_tokens <= block_n,
        "ONE_CHUNK": dim <= block_d,
        "EVEN_D": dim % block_d == 0,
        "num_warps": warps,
        "num_stages": 4 if hopper and not separate else 3,
    }
    if block_t == 16 and generation == 8 and dtype != torch.float32:
        options["maxnreg"] = 255  # else ptxas aims at 128 registers, and spills to get there
    return options
