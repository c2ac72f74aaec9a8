"""The forward kernel of slot attention for any input with T <= 64.

A program holds the outputs of one image and head for a slice of the channels: an inner loop over all channels gives the
scores of a tile of tokens, a second load its values. Wider tokens go to further programs, each with the scores anew.
The slices of an image are neighbours in the grid, so that all but the first find its tokens in the L2 cache.
"""

import triton
import triton.language as tl

from ..launch import LOG2E
from .forward_common import over_tokens, softmax_over_queries


@triton.jit
def slot_attention_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    bias_ptr,
    mask_ptr,
    out_ptr,
    mass_ptr,
    map_ptr,
    entropy_ptr,
    value_sum_ptr,
    q_stride_b,
    q_stride_h,
    q_stride_t,
    k_stride_b,
    k_stride_g,
    k_stride_n,
    v_stride_b,
    v_stride_g,
    v_stride_n,
    num_heads,
    heads_per_group,
    num_queries,
    num_tokens,
    split_tokens,
    dim,
    scale,
    eps,
    norm_eps,
    NORMALIZE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_NORM: tl.constexpr,
    STORE_MAP: tl.constexpr,
    STORE_ENTROPY: tl.constexpr,
    PARTIAL: tl.constexpr,  # this program sees some of the tokens: store plain sums, for the combine kernel
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,  # channels of one step of the scores' sum
    BLOCK_V: tl.constexpr,  # channels of the output that this program owns
):
    slices = tl.cdiv(dim, BLOCK_V)
    row = (tl.program_id(0) // slices).to(tl.int64)  # image * num_heads + head; B T D passes 2**31 in real batches
    part_of_dim = tl.program_id(0) % slices
    image = row // num_heads
    head = row % num_heads
    group = head // heads_per_group
    t = tl.arange(0, BLOCK_T)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    channel = part_of_dim * BLOCK_V + tl.arange(0, BLOCK_V)
    leads = part_of_dim == 0  # stores what does not depend on the channels
    split = tl.program_id(1)
    query_in = t < num_queries
    channel_in = channel < dim
    # Padded and absent queries take no share of the softmax over queries.
    present = query_in
    if HAS_MASK:
        present &= tl.load(mask_ptr + image * num_queries + t, mask=query_in, other=0) != 0
    bias = tl.zeros((BLOCK_T,), tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + row * num_queries + t, mask=query_in, other=0.0) * LOG2E
    bias = tl.where(present, bias, float("-inf"))

    q_rows = q_ptr + image * q_stride_b + head * q_stride_h + t.to(tl.int64)[:, None] * q_stride_t + d[None, :]
    k_base = k_ptr + image * k_stride_b + group * k_stride_g
    v_base = v_ptr + image * v_stride_b + group * v_stride_g
    out = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
    mass = tl.zeros((BLOCK_T,), tl.float32)
    mean_part = tl.zeros((BLOCK_T,), tl.float32)  # sum_n of what the tokens' means contribute to A^T v
    value_sum = tl.zeros((BLOCK_V,), tl.float32)
    entropy = tl.zeros((BLOCK_N,), tl.float32)  # in bits
    map_rows = map_ptr + row * num_queries * num_tokens
    first = split * split_tokens
    last = tl.minimum(first + split_tokens, num_tokens)
    for start in range(first, last, BLOCK_N):
        token = start + n
        token_in = token < last
        k_rows = k_base + token.to(tl.int64)[:, None] * k_stride_n + d[None, :]
        scores = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
        query_sum = tl.zeros((BLOCK_T,), tl.float32)
        mean = tl.zeros((BLOCK_N,), tl.float32)
        squares = tl.zeros((BLOCK_N,), tl.float32)
        for offset in range(0, dim, BLOCK_D):
            in_dim = (offset + d < dim)[None, :]
            q = tl.load(q_rows + offset, mask=query_in[:, None] & in_dim, other=0.0)
            k = tl.load(k_rows + offset, mask=token_in[:, None] & in_dim, other=0.0)
            scores = tl.dot(q, tl.trans(k), scores, input_precision=PRECISION)
            if HAS_NORM:
                # A chunk's mean and squares, joined to those so far (Chan et al. 1979): exact at any offset.
                raw = k.to(tl.float32)
                count = tl.minimum(dim - offset, BLOCK_D)
                chunk_mean = tl.sum(raw, 1) / count
                centred = tl.where(in_dim, raw - chunk_mean[:, None], 0.0)
                gap = chunk_mean - mean
                share = count / (offset + count)
                squares += tl.sum(centred * centred, 1) + gap * gap * offset * share
                mean += gap * share
                query_sum += tl.sum(q.to(tl.float32), 1)
        if HAS_NORM:
            # Padded tokens have no variance: at norm_eps = 0 their infinite rstd would reach every query.
            rstd = tl.rsqrt(tl.where(token_in, squares / dim, 1.0) + norm_eps)
            scores = (scores - query_sum[:, None] * mean[None, :]) * rstd[None, :]
        assignment, terms = softmax_over_queries(scores * (scale * LOG2E) + bias[:, None], 0)
        assignment = tl.where(token_in[None, :], assignment, 0.0)
        mass += tl.sum(assignment, 1)
        if STORE_ENTROPY:
            entropy += tl.where(token_in, tl.sum(terms, 0), 0.0)
        if STORE_MAP:
            entry = t[:, None] * num_tokens + token[None, :]
            tl.store(map_rows + entry, assignment, mask=(query_in[:, None] & token_in[None, :]) & leads)
        v_rows = v_base + token.to(tl.int64)[:, None] * v_stride_n + channel[None, :]
        v = tl.load(v_rows, mask=token_in[:, None] & channel_in[None, :], other=0.0)
        if HAS_NORM:
            # (v - mean) rstd, with rstd in the weights. The correction uses the weights as the dot rounds them: else
            # their rounding times the mean stays in the result (bf16, mean at 5 sigma: error 6.9e-3, not 3.1e-3).
            rounded = (assignment * rstd[None, :]).to(v.dtype)
            mean_part += tl.sum(rounded.to(tl.float32) * mean[None, :], 1)
        else:
            rounded = assignment.to(v.dtype)
        out = tl.dot(rounded, v, out, input_precision=PRECISION)
        if NORMALIZE == "mean":
            values = v.to(tl.float32)
            if HAS_NORM:
                values = tl.where(token_in[:, None], (values - mean[:, None]) * rstd[:, None], 0.0)
            value_sum += tl.sum(values, 0)

    if HAS_NORM:
        out -= mean_part[:, None]
    part = split * (tl.num_programs(0) // slices) + row  # row, unless PARTIAL
    if not PARTIAL:
        out = over_tokens(out, mass[:, None], value_sum[None, :], num_tokens, eps, NORMALIZE)
        out = tl.where(present[:, None], out, 0.0)
    elif NORMALIZE == "mean":
        tl.store(value_sum_ptr + part * dim + channel, value_sum, mask=channel_in)
    out_rows = out_ptr + (part * num_queries + t[:, None]) * dim + channel[None, :]
    tl.store(out_rows, out.to(out_ptr.dtype.element_ty), mask=query_in[:, None] & channel_in[None, :])
    tl.store(mass_ptr + part * num_queries + t, mass, mask=query_in & leads)
    if STORE_ENTROPY:
        tl.store(entropy_ptr + part, tl.sum(entropy, 0) / LOG2E, mask=leads)
