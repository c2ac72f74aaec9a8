"""The launcher of slot attention's forward: which kernel runs, and over how many programs.

A program holds the outputs of one image and head: a tile of tokens gives the scores of all T queries, their softmax,
and its share of s and A^T v; nothing grows with N. The kernel of forward_one_pass.py does so for half-precision tokens
that are keys and values, the model's case, that of forward_general.py for all others. Few images leave most of the GPU
idle: their tokens then split over several programs, whose sums a kernel of forward_common.py adds; in a fixed order, so
that results repeat.
"""

import torch
import triton
from torch import Tensor

from .. import launch
from ..launch import on_device_of, readable
from .forward_common import slot_attention_combine_kernel
from .forward_general import slot_attention_fwd_kernel
from .forward_one_pass import slot_attention_one_pass_fwd_kernel
from .options import general_options, one_pass_options

COMBINE_BLOCK = 256  # channels a program of the combine kernel


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
    """`core` (ops.py) on a GPU, or interpreted."""
    batch, heads, num_queries, dim = q.shape
    groups, num_tokens = k.shape[1:3]
    norm = norm_eps is not None
    one_pass = None
    if v is None:
        limit = launch.shared_memory(q)
        one_pass = one_pass_options(
            num_queries, dim, q.dtype, normalize=normalize, norm=norm, return_map=return_map, limit=limit
        )
    options = one_pass or general_options(
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
    slot_attention_combine_kernel[(batch * heads * num_queries, triton.cdiv(dim, COMBINE_BLOCK))](
        *(sums, masses, value_sum, mask, out, mass),
        *(splits, heads, num_queries, num_tokens, dim, eps),
        NORMALIZE=normalize,
        HAS_MASK=mask is not None,
        BLOCK_D=COMBINE_BLOCK,
    )
    return mass
