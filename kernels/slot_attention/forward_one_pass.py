"""The forward kernel of slot attention for half-precision tokens that are both keys and values: each is read once.

A warp owns a slice of the channels in the scores' product, so that a tile of tokens in shared memory serves both
products: a batched dot gives every warp's share of S, [WARPS, T, N]; the shares are added; the softmax is spread over
all warps; then A^T E accumulates in registers, 3 x [32, 256] floats for T = 20 and D = 768. One program needs all of a
multiprocessor for that, but reads an image's tokens once, where the general kernel reads them three times.
"""

import triton
import triton.language as tl

from ..launch import LOG2E
from .forward_common import over_tokens, softmax_over_queries


@triton.jit
def slot_attention_one_pass_fwd_kernel(
    q_ptr,
    k_ptr,
    bias_ptr,
    mask_ptr,
    query_sum_ptr,
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
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,  # channels of one chunk; the tokens and queries are held in CHUNKS of them
    CHUNKS: tl.constexpr,
    WARPS: tl.constexpr,  # 8, each with a slice of every chunk in the scores' product
):
    row = tl.program_id(0).to(tl.int64)  # image * num_heads + head; B * T * D elements pass 2**31 in real batches
    split = tl.program_id(1)
    image = row // num_heads
    head = row % num_heads
    SLICE: tl.constexpr = BLOCK_C // WARPS
    # The last padded query takes sums on the side: with weight 1 for every token its row of A^T E is sum_n e_n, which
    # the normaliser "mean" needs; with ones as channels its scores are D times the tokens' means.
    SPARE: tl.constexpr = BLOCK_T - 1
    t = tl.arange(0, BLOCK_T)
    n = tl.arange(0, BLOCK_N)
    c = tl.arange(0, BLOCK_C)
    query_in = t < num_queries
    # Padded and absent queries take no share of the softmax over queries.
    present = query_in
    if HAS_MASK:
        present &= tl.load(mask_ptr + image * num_queries + t, mask=query_in, other=0) != 0
    bias = tl.zeros((BLOCK_T,), tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + row * num_queries + t, mask=query_in, other=0.0) * LOG2E
    bias = tl.where(present, bias, float("-inf"))

    sliced = tl.arange(0, WARPS)[:, None, None] * SLICE + tl.arange(0, SLICE)[None, None, :]
    q_rows = q_ptr + image * q_stride_b + head * q_stride_h + t.to(tl.int64)[None, :, None] * q_stride_t + sliced
    queries = tl.tuple(())  # one entry a chunk
    sums = tl.tuple(())
    if HAS_NORM:
        query_sum = tl.load(query_sum_ptr + row * num_queries + t, mask=query_in, other=0.0)
    for i in tl.static_range(CHUNKS):
        in_chunk = query_in[None, :, None] & (i * BLOCK_C + sliced < dim)
        q = tl.load(q_rows + i * BLOCK_C, mask=in_chunk, other=0.0)
        if HAS_NORM:
            q = tl.where((t == SPARE)[None, :, None], 1.0, q.to(tl.float32)).to(q.dtype)
        queries += (q,)
        sums += (tl.zeros((BLOCK_T, BLOCK_C), tl.float32),)
    # One entry a token of the tile and query, added up after the loop: no reduction between warps inside it.
    mass = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    entropy = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)  # in bits
    mean_part = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)  # what the tokens' means contribute to A^T E

    k_base = k_ptr + image * k_stride_b + (head // heads_per_group) * k_stride_g
    map_rows = map_ptr + row * num_queries * num_tokens
    first = split * split_tokens
    last = tl.minimum(first + split_tokens, num_tokens)
    for start in range(first, last, BLOCK_N):
        token = start + n
        token_in = token < last
        k_rows = k_base + token.to(tl.int64)[:, None] * k_stride_n + c[None, :]
        tokens = tl.tuple(())
        for i in tl.static_range(CHUNKS):
            chunk_in = token_in[:, None] & (i * BLOCK_C + c < dim)[None, :]
            k = tl.load(k_rows + i * BLOCK_C, mask=chunk_in, other=0.0)
            tokens += (k,)
        if HAS_NORM:
            gram = tl.zeros((WARPS * BLOCK_N // 16, 16, 16), tl.float32)
            for i in tl.static_range(CHUNKS):
                blocks = tl.permute(tl.reshape(tokens[i], BLOCK_N // 16, 16, WARPS, SLICE), 2, 0, 1, 3)
                blocks = tl.reshape(blocks, WARPS * BLOCK_N // 16, 16, SLICE)
                gram = tl.dot(blocks, tl.trans(blocks, 0, 2, 1), gram)
            diagonal = tl.arange(0, 16)[:, None] == tl.arange(0, 16)[None, :]
            squares = tl.sum(tl.where(diagonal[None], gram, 0.0), 2)
            squares = tl.sum(tl.reshape(squares, WARPS, BLOCK_N), 0)
        shares = tl.zeros((WARPS, BLOCK_T, BLOCK_N), tl.float32)
        for i in tl.static_range(CHUNKS):
            shares = tl.dot(queries[i], tl.permute(tl.reshape(tokens[i], BLOCK_N, WARPS, SLICE), 1, 2, 0), shares)
        # tl.split needs its axis within a thread, so the shares move to a layout in which no two threads hold the same.
        # tl.sum would leave the sum in every warp, each to compute the whole softmax: 1,060 instructions, not 490.
        shares = tl.reshape(tl.permute(shares, 2, 1, 0), BLOCK_N, BLOCK_T, WARPS // 4, 2, 2)
        even, odd = tl.split(shares)
        even, odd = tl.split(even + odd)
        even, odd = tl.split(even + odd)
        scores = even + odd
        if HAS_NORM:
            # Squares are summed uncentred: the cancellation error grows with a token's offset as that of its rounding
            # to half precision does, and stays below it.
            mean = tl.sum(tl.where((t == SPARE)[None, :], scores, 0.0), 1) / dim
            variance = tl.maximum(squares / dim - mean * mean, 0.0)
            # Padded tokens have none: at norm_eps = 0 their infinite rstd would reach every query through the product.
            rstd = tl.rsqrt(tl.where(token_in, variance, 1.0) + norm_eps)
            scores = (scores - mean[:, None] * query_sum[None, :]) * rstd[:, None]
        assignment, terms = softmax_over_queries(scores * (scale * LOG2E) + bias[None, :], 1)
        assignment = tl.where(token_in[:, None], assignment, 0.0)
        mass += assignment
        if STORE_ENTROPY:
            entropy += tl.where(token_in[:, None], terms, 0.0)
        if STORE_MAP:
            entry = t[None, :] * num_tokens + token[:, None]
            tl.store(map_rows + entry, assignment, mask=query_in[None, :] & token_in[:, None])
        weights = assignment
        if NORMALIZE == "mean":
            weights = tl.where((t == SPARE)[None, :] & token_in[:, None], 1.0, weights)
        if HAS_NORM:
            # (e - mean) rstd, with rstd in the weights. The correction uses the weights as the dot rounds them: else
            # their rounding times the mean stays in the result (bf16, mean at 5 sigma: error 6.9e-3, not 3.1e-3).
            weights = weights * rstd[:, None]
        rounded = weights.to(k_ptr.dtype.element_ty)
        if HAS_NORM:
            mean_part += rounded.to(tl.float32) * mean[:, None]
        rounded = tl.trans(rounded)
        added = tl.tuple(())
        for i in tl.static_range(CHUNKS):
            added += (tl.dot(rounded, tokens[i], sums[i]),)
        sums = added

    mass = tl.sum(mass, 0)
    mean_part = tl.sum(mean_part, 0)
    part = split * tl.num_programs(0) + row  # row, unless PARTIAL
    tl.store(mass_ptr + part * num_queries + t, mass, mask=query_in)
    if STORE_ENTROPY:
        tl.store(entropy_ptr + part, tl.sum(tl.sum(entropy, 1), 0) / LOG2E)
    for i in tl.static_range(CHUNKS):
        channel = i * BLOCK_C + c
        out = sums[i]
        if HAS_NORM:
            out -= mean_part[:, None]
        value_sum = tl.zeros((BLOCK_C,), tl.float32)
        if NORMALIZE == "mean":
            value_sum = tl.sum(tl.where((t == SPARE)[:, None], out, 0.0), 0)
            if PARTIAL:
                tl.store(value_sum_ptr + part * dim + channel, value_sum, mask=channel < dim)
        if not PARTIAL:
            out = over_tokens(out, mass[:, None], value_sum[None, :], num_tokens, eps, NORMALIZE)
            out = tl.where(present[:, None], out, 0.0)
        out_rows = out_ptr + (part * num_queries + t[:, None]) * dim + channel[None, :]
        tl.store(out_rows, out.to(out_ptr.dtype.element_ty), mask=query_in[:, None] & (channel < dim)[None, :])
