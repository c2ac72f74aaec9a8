"""What both forward kernels of slot attention share: softmax, normaliser, and the adding up of split tokens' sums."""

import triton
import triton.language as tl


@triton.jit
def softmax_over_queries(scores, AXIS: tl.constexpr):
    """A = 2^scores / total over the queries along AXIS, and -A log2 A. A score of -inf: an absent query."""
    top = tl.max(scores, AXIS, keep_dims=True)
    top = tl.where(top == float("-inf"), 0.0, top)  # an image without a single query
    centred = scores - top
    exps = tl.exp2(centred)
    total = tl.sum(exps, AXIS, keep_dims=True)
    total = tl.where(total == 0.0, 1.0, total)
    assignment = exps / total
    # Below 2^-150 A is 0, whatever it is multiplied with; only -inf would make that a NaN.
    return assignment, assignment * (tl.log2(total) - tl.maximum(centred, -1000.0))


@triton.jit
def over_tokens(sums, mass, value_sum, num_tokens, eps, NORMALIZE: tl.constexpr):
    """W^T V from A^T V, the mass s and sum_n v_n, which broadcast to it.

    eps, mass and their quotient stay fp32: 1e-8 is 0 in fp16 and a query without tokens would give 0 / 0.
    """
    if NORMALIZE == "mean":
        sums = (sums + eps * value_sum) / (mass + num_tokens * eps)
    elif NORMALIZE == "den":
        sums = sums / (mass + eps)
    elif NORMALIZE == "l1max":
        sums = sums / tl.maximum(mass, eps)
    return sums


@triton.jit
def slot_attention_combine_kernel(
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
