"""The launcher of slot attention's backward kernels: what slot_attention_core.py calls for tensors on a GPU.

`triton_backward` (slot_attention_score_gradient.py) gives the gradients of queries and bias and the factors of the
tokens' gradient; `triton_token_gradients` (slot_attention_token_gradient.py) multiplies the factors out.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from ..compile_check import Case, pointer_to
from ..launch import gpu_generation, on_device_of, readable
from .backward_scores import slot_attention_bwd_kernel
from .backward_tokens import ENOUGH_PROGRAMS, triton_token_gradients
from .cpu import padded_queries

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
        generation=gpu_generation(q),
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


def compile_cases() -> Iterator[Case]:
    """The configurations that `compile_check` compiles: what the decoder uses, and corners of the allowed shapes."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    for generation in (8, 9, 10):
        for dtype, num_queries, num_tokens, dim, separate, norm, level in (
            (bf16, 20, 196, 768, False, False, 0),
            (bf16, 20, 196, 768, False, False, 1),
            (bf16, 20, 196, 768, False, False, 2),
            (bf16, 20, 196, 768, False, True, 2),
            (bf16, 20, 196, 768, False, True, 3),
            (bf16, 20, 576, 768, False, False, 0),
            (bf16, 20, 576, 768, False, True, 2),
            (bf16, 8, 144, 384, False, False, 1),
            (bf16, 20, 196, 64, True, False, 0),
            (bf16, 20, 196, 64, True, False, 3),
            (fp16, 20, 49, 384, True, False, 3),
            (bf16, 1, 196, 16, False, True, 3),
            (bf16, 64, 576, 1024, False, True, 3),
            (bf16, 20, 256, 1408, False, False, 1),
            (bf16, 20, 729, 1152, False, True, 2),
            (bf16, 20, 256, 2048, True, False, 3),
            (fp32, 20, 196, 768, False, True, 3),
            (fp32, 64, 196, 1024, False, True, 3),
        ):
            yield _compile_case(
                generation, dtype, num_queries, num_tokens, dim, separate=separate, norm=norm, level=level
            )
        yield _compile_case(generation, bf16, 20, 576, 768, separate=False, norm=True, level=2, split=True)


def _compile_case(
    generation: int,
    dtype: torch.dtype,
    num_queries: int,
    num_tokens: int,
    dim: int,
    *,
    separate: bool,
    norm: bool,
    level: int,
    split: bool = False,
) -> Case:
    """`separate`: v given; level 1: gradient of the entropy; 2: bias, gradient of the mass; 3: mask, map and `mean`."""
    options = _launch_options(
        num_queries,
        num_tokens,
        dim,
        dtype,
        separate=separate,
        norm=norm,
        extras=level > 0,
        grad_map=level > 2,
        generation=generation,
    )
    element = pointer_to(dtype)
    pointers = dict.fromkeys(("q_ptr", "k_ptr", "grad_out_ptr", "out_ptr", "coefficients_ptr", "grad_q_ptr"), element)
    floats = ["mass_ptr"]
    floats += ["grad_q_ptr" if split else "sums_ptr"] * (not options["ONE_BLOCK"]) + ["affine_ptr"] * norm
    floats += ["grad_entropy_ptr"] * (level > 0) + ["bias_ptr", "grad_mass_ptr", "grad_bias_ptr"] * (level > 1)
    floats += ["grad_map_ptr"] * (level > 2)
    pointers |= dict.fromkeys(floats, "*fp32")
    pointers |= {"v_ptr": element} if separate else {}
    pointers |= {"mask_ptr": "*u8"} if level > 2 else {}
    axes = {"q": "bht", "k": "bgn", "v": "bgn", "grad_out": "bht", "map": "bht"}
    strides = [f"{x}_stride_{axis}" for x, letters in axes.items() for axis in letters]
    counts = ("num_heads", "heads_per_group", "num_queries", "num_tokens", "dim")
    types = pointers | dict.fromkeys((*strides, *counts), "i32") | dict.fromkeys(("scale", "eps", "norm_eps"), "fp32")
    absent = [name for name in slot_attention_bwd_kernel.arg_names if name.endswith("_ptr") and name not in pointers]
    name = f"slot_attention bwd {str(dtype).removeprefix('torch.')} T={num_queries} N={num_tokens} D={dim}"
    name += (
        f"{' v' * separate}{' norm' * norm}{('', ' entropy', ' bias entropy', ' mean all')[level]}{' split' * split}"
    )
    return Case(
        name=name,
        kernel=slot_attention_bwd_kernel,
        types=types,
        constants=dict.fromkeys(absent)
        | {"map_stride_n": 1, "NORMALIZE": "mean" if level > 2 else "den", "HAS_NORM": norm, "SPLIT": split}
        | {key: value for key, value in options.items() if key.isupper()},
        divisible=(*pointers, *strides, "dim"),
        options={key: value for key, value in options.items() if key.islower()},
        tensor_core=dtype != torch.float32,
        generation=generation,
    )
