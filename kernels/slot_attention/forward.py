"""The Triton forward of slot attention: which kernel runs, and over how many programs.

A program holds the outputs of one image and head: a tile of tokens gives the scores of all T queries, their softmax,
and its share of s and A^T v; nothing grows with N. The kernel of slot_attention_one_pass.py does so for half-precision
tokens that are keys and values, the model's case, that of slot_attention_general.py for all others. Few images leave
most of the GPU idle: their tokens then split over several programs, whose sums `_combine_kernel` adds; in a fixed
order, so that results repeat.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch
from ..launch import on_device_of, readable
from .forward_general import over_tokens, slot_attention_fwd_kernel
from .forward_one_pass import one_pass_options, slot_attention_one_pass_fwd_kernel
from .plain import padded_queries

COMBINE_BLOCK = 256  # channels a program of `_combine_kernel`


@triton.jit
def _combine_kernel(
    sums_ptr,  # A^T v, mass and sum_n v_n of every split; (splits, B * H, T, D), (splits, B * H, T), (splits, B * H, D)
    masses_ptr,
    value_sums_ptr,
    mask_ptr,
    out_ptr,
    mass_ptr,
    splits,
    num_heads,
    num_queries,
    num_tokens,
    dim,
    eps,
    NORMALIZE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    slot = tl.program_id(0).to(tl.int64)  # (image * num_heads + head) * num_queries + query
    row = slot // num_queries
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    channel_in = channel < dim
    rows = tl.num_programs(0) // num_queries
    out = tl.zeros((BLOCK_D,), tl.float32)
    value_sum = tl.zeros((BLOCK_D,), tl.float32)
    mass = 0.0
    for split in range(0, splits):
        part = split * rows
        mass += tl.load(masses_ptr + part * num_queries + slot)
        out += tl.load(sums_ptr + (part * num_queries + slot) * dim + channel, mask=channel_in, other=0.0)
        if NORMALIZE == "mean":
            value_sum += tl.load(value_sums_ptr + (part + row) * dim + channel, mask=channel_in, other=0.0)
    out = over_tokens(out, mass, value_sum, num_tokens, eps, NORMALIZE)
    if HAS_MASK:
        present = tl.load(mask_ptr + row // num_heads * num_queries + slot % num_queries)
        out = tl.where(present != 0, out, 0.0)
    tl.store(out_ptr + slot * dim + channel, out.to(out_ptr.dtype.element_ty), mask=channel_in)
    tl.store(mass_ptr + slot, mass, mask=tl.program_id(1) == 0)


def _launch_options(
    num_queries: int, dim: int, dtype: torch.dtype, *, norm: bool, normalize: str, generation: int
) -> dict[str, Any]:
    """Blocks, warps and stages, chosen so that no configuration of the compile check spills a register.

    Channels beyond BLOCK_V go to further programs, which compute the scores again from tokens that are in cache then.
    """
    full = dtype == torch.float32  # at full precision the tensor cores are out, and operands sit in registers
    extras = norm or normalize == "mean"  # statistics and the plain sum of the values live beside the accumulator
    block_t = padded_queries(num_queries)
    block_v = min(max(32 if full else 16, triton.next_power_of_2(dim)), (8192 if full or extras else 16384) // block_t)
    narrow = block_v <= 64  # room for more tokens a step
    # Tuned for no spills only: in full precision, 32 channels with the sum of the values beside them are too many.
    few = block_t != 32 or (normalize == "mean" and not norm)
    # Blackwell: Triton 3.6 puts products of 64 rows on the tensor cores, "ieee" or not, where one TF32 product has 10
    # bits; three have 21.
    thrice = block_t == 64 and generation >= 10
    options = {
        "PRECISION": "tf32" if not full else "tf32x3" if thrice else "ieee",
        "BLOCK_T": block_t,
        "BLOCK_N": 16 if full else 64 if narrow else 32,
        "BLOCK_D": min(block_v, 128) if not full else 16 if few else 32,
        "BLOCK_V": block_v,
        "num_warps": 8,
        "num_stages": 2,
    }
    if narrow and (full or extras):
        options["maxnreg"] = 255  # else ptxas aims at 80 or 128 registers, and spills to get there
    return options


def triton_forward(
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
    """`core` (slot_attention_core.py) on a GPU, or interpreted."""
    batch, heads, num_queries, dim = q.shape
    groups, num_tokens = k.shape[1:3]
    norm = norm_eps is not None
    one_pass = None
    if v is None:
        limit = launch.shared_memory(q)
        one_pass = one_pass_options(
            num_queries, dim, q.dtype, normalize=normalize, norm=norm, return_map=return_map, limit=limit
        )
    options = one_pass or _launch_options(
        num_queries, dim, q.dtype, norm=norm, normalize=normalize, generation=launch.gpu_generation(q)
    )
    slices = 1 if one_pass else triton.cdiv(dim, options["BLOCK_V"])
    splits, split_tokens = _splits(q, batch * heads * slices, num_tokens, options["BLOCK_N"])
    partial = splits > 1

    def empty(*shape: int, wanted: bool = True) -> Tensor:
        return q.new_empty(shape if wanted else 0, dtype=torch.float32)

    out = q.new_empty(batch, heads, num_queries, dim)
    assignment = empty(batch, heads, num_queries, num_tokens, wanted=return_map)
    mass = empty(splits, batch, heads, num_queries)
    entropy = empty(splits, batch, heads, wanted=return_entropy)
    sums = empty(splits, batch, heads, num_queries, dim) if partial else out
    value_sum = empty(splits, batch, heads, dim) if partial and normalize == "mean" else None
    if batch == 0:
        return out, mass[0], assignment, entropy[0] if return_entropy else entropy
    q, k, values = readable(q), readable(k), readable(k if v is None else v)
    bias = bias if bias is None else bias.contiguous()
    mask = mask if mask is None else mask.contiguous().view(torch.uint8)
    outputs = (sums, mass, assignment, entropy, value_sum)
    strides = (*q.stride()[:3], *k.stride()[:3])
    numbers = (heads, heads // groups, num_queries, num_tokens, split_tokens, dim, scale, eps, norm_eps or 0.0)
    flags = {
        "NORMALIZE": normalize,
        "HAS_BIAS": bias is not None,
        "HAS_MASK": mask is not None,
        "HAS_NORM": norm,
        "STORE_MAP": return_map,
        "STORE_ENTROPY": return_entropy,
        "PARTIAL": partial,
    }
    with on_device_of(q):
        if one_pass:
            query_sum = q.sum(-1, dtype=torch.float32).contiguous() if norm else None
            slot_attention_one_pass_fwd_kernel[(batch * heads, splits)](
                q, k, bias, mask, query_sum, *outputs, *strides, *numbers, **flags, **options
            )
        else:
            strides += values.stride()[:3]
            slot_attention_fwd_kernel[(batch * heads * slices, splits)](
                q, k, values, bias, mask, *outputs, *strides, *numbers, **flags, **options
            )
        if partial:
            mass = _combine(sums, mass, value_sum, mask, out, num_tokens, normalize, eps)
            entropy = entropy.sum(0, keepdim=True) if return_entropy else entropy
    return out, mass[0], assignment, entropy[0] if return_entropy else entropy


def _splits(q: Tensor, programs: int, num_tokens: int, block_n: int) -> tuple[int, int]:
    """Over how many programs an image's tokens split, and how many tokens each takes: one wave, if it is not full."""
    tiles = triton.cdiv(num_tokens, block_n)
    split_tiles = triton.cdiv(tiles, max(1, launch.multiprocessors(q) // max(1, programs)))
    return triton.cdiv(tiles, split_tiles), split_tiles * block_n


def _combine(
    sums: Tensor,
    masses: Tensor,
    value_sum: Tensor | None,
    mask: Tensor | None,
    out: Tensor,
    num_tokens: int,
    normalize: str,
    eps: float,
) -> Tensor:
    """Add the splits' sums, normalise them into `out`; the mass, (1, B, H, T)."""
    splits, batch, heads, num_queries, dim = sums.shape
    mass = torch.empty_like(masses[:1])
    _combine_kernel[(batch * heads * num_queries, triton.cdiv(dim, COMBINE_BLOCK))](
        *(sums, masses, value_sum, mask, out, mass),
        *(splits, heads, num_queries, num_tokens, dim, eps),
        NORMALIZE=normalize,
        HAS_MASK=mask is not None,
        BLOCK_D=COMBINE_BLOCK,
    )
    return mass
