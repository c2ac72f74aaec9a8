"""Slot attention's first backward kernel: gradients of queries and bias, and the tokens' gradient in two factors.

    g = P (dW - delta) + A (ds + dA - dh ln A)      dS = g - A sum_t g      dq = scale dS^T k      db = sum_n dS
    C1 = scale dS and C2 = W, from which backward_tokens.py makes dE = C1 q + C2 dout

with P = A / c, dW = v dout^T and delta = dout . out = sum_n W dW. c comes from the saved mass: dS of a token needs no
other token but for delta, which is summed here if all tokens are here, and else taken from the saved out. A program
holds the scores of all queries for a block of tokens (256 x 32: the 196 of an image fit) in registers, and streams the
channels past them twice: once for S and dW, once, backwards, for dq. The second time they come from the L2 cache: 132
programs hold 40 MB of tokens at N = 196, D = 768, and what they read first was read last.

Letters as in __init__.py.
"""

import triton
import triton.language as tl

from ..launch import LOG2E

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _load_chunk(rows, offset, row_in, dim, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr):
    inside = row_in[:, None]
    if not EVEN_D:
        inside &= (offset + tl.arange(0, BLOCK_D) < dim)[None, :]
    return tl.load(rows + offset, mask=inside, other=0.0)


@triton.jit
def _channel_sums(k, offset, pivot, dim, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr):
    """Sums of k - pivot and of its square over groups of 8 channels, which lie in one thread: no exchange yet."""
    centred = k.to(tl.float32) - pivot[:, None]
    if not EVEN_D:
        centred = tl.where((offset + tl.arange(0, BLOCK_D) < dim)[None, :], centred, 0.0)
    squares = tl.reshape(centred * centred, (BLOCK_N, BLOCK_D // 8, 8))
    return tl.sum(tl.reshape(centred, (BLOCK_N, BLOCK_D // 8, 8)), 2), tl.sum(squares, 2)


@triton.jit
def _row_dots(x_rows, y_rows, row_in, dim, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr):
    """sum_d x y of each row."""
    total = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for offset in tl.range(0, dim, BLOCK_D, num_stages=3):
        x = _load_chunk(x_rows, offset, row_in, dim, BLOCK_D, EVEN_D)
        y = _load_chunk(y_rows, offset, row_in, dim, BLOCK_D, EVEN_D)
        total += x.to(tl.float32) * y.to(tl.float32)
    return tl.sum(total, 1)


@triton.jit
def _add_rows(rows, out_ptr, sums_ptr, offsets, inside, is_first, is_last):
    """Add to the sums of the token blocks before, by the same program, in fp32; only the last writes the result."""
    if sums_ptr is not None:
        rows += tl.load(sums_ptr + offsets, mask=inside & (not is_first), other=0.0)
        tl.store(sums_ptr + offsets, rows, mask=inside & (not is_last))
        inside &= is_last
    tl.store(out_ptr + offsets, rows.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def slot_attention_bwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,  # None: the values are the keys
    grad_out_ptr,
    out_ptr,
    mass_ptr,
    bias_ptr,
    mask_ptr,
    grad_mass_ptr,
    grad_map_ptr,
    grad_entropy_ptr,
    grad_q_ptr,  # with SPLIT: a partial sum per block, as for grad_bias
    sums_ptr,  # grad_q so far, where a program goes through several blocks
    grad_bias_ptr,
    coefficients_ptr,
    affine_ptr,
    q_stride_b,
    q_stride_h,
    q_stride_t,
    k_stride_b,
    k_stride_g,
    k_stride_n,
    v_stride_b,
    v_stride_g,
    v_stride_n,
    grad_out_stride_b,
    grad_out_stride_h,
    grad_out_stride_t,
    map_stride_b,
    map_stride_h,
    map_stride_t,
    map_stride_n,
    num_heads,
    heads_per_group,
    num_queries,
    num_tokens,
    dim,
    scale,
    eps,
    norm_eps,
    NORMALIZE: tl.constexpr,
    HAS_NORM: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
    ONE_CHUNK: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    num_blocks = tl.cdiv(num_tokens, BLOCK_N)
    if SPLIT:  # a block a program, those of one image and head next to each other: they read the same queries
        first_block = tl.program_id(0) % num_blocks
        row = (tl.program_id(0) // num_blocks).to(tl.int64)
        sums_row = first_block * (tl.num_programs(0) // num_blocks).to(tl.int64) + row
    else:
        first_block = 0
        row = tl.program_id(0).to(tl.int64)
        sums_row = row
    # row is image * num_heads + head, in 64 bits: B * T * D elements pass 2**31 in real batches.
    image = row // num_heads
    head = row % num_heads
    group = head // heads_per_group
    t = tl.arange(0, BLOCK_T)
    d = tl.arange(0, BLOCK_D)
    query_in = t < num_queries
    # Offsets within an image and head are 32 bits wide (the launcher sees to it): half the registers of pointers.
    q_rows = q_ptr + image * q_stride_b + head * q_stride_h + (t[:, None] * q_stride_t + d[None, :])
    grad_rows = grad_out_ptr + image * grad_out_stride_b + head * grad_out_stride_h
    grad_rows += t[:, None] * grad_out_stride_t + d[None, :]
    k_base = k_ptr + image * k_stride_b + group * k_stride_g
    out_rows = out_ptr + row * num_queries * dim + (t[:, None] * dim + d[None, :])
    sums_rows = sums_row * num_queries * dim + (t[:, None] * dim + d[None, :])
    if NORMALIZE != "sum" and not ONE_BLOCK:
        out_delta = _row_dots(grad_rows, out_rows, query_in, dim, BLOCK_T, BLOCK_D, EVEN_D)
    bias_sum = tl.zeros((BLOCK_T,), tl.float32)
    steps = 1 if ONE_BLOCK or SPLIT else num_blocks
    for step in range(steps):
        token = (first_block + step) * BLOCK_N + tl.arange(0, BLOCK_N)
        token_in = token < num_tokens
        k_rows = k_base + (token[:, None] * k_stride_n + d[None, :])
        if v_ptr is not None:
            v_rows = v_ptr + image * v_stride_b + group * v_stride_g + (token[:, None] * v_stride_n + d[None, :])
        scores = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
        grad_weights = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
        if HAS_NORM:
            # Sums of x - pivot and of its square, x a channel and pivot the mean of the first 16: (mean - pivot)^2 is
            # at most D / 16 variances, so that no offset of the tokens costs more than 6 bits of the variance.
            pivot_d = tl.arange(0, 16)
            pivot_rows = k_base + (token[:, None] * k_stride_n + pivot_d[None, :])
            pivot = tl.load(pivot_rows, mask=token_in[:, None] & (pivot_d < dim)[None, :], other=0.0)
            pivot = tl.sum(pivot.to(tl.float32), 1) / tl.minimum(dim, 16)
            total_part = tl.zeros((BLOCK_N, BLOCK_D // 8), tl.float32)
            squares_part = tl.zeros((BLOCK_N, BLOCK_D // 8), tl.float32)
            query_part = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
            grad_part = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
        if ONE_CHUNK:
            q = _load_chunk(q_rows, 0, query_in, dim, BLOCK_D, EVEN_D)
            grad_out = _load_chunk(grad_rows, 0, query_in, dim, BLOCK_D, EVEN_D)
            k = _load_chunk(k_rows, 0, token_in, dim, BLOCK_D, EVEN_D)
            v = k
            if v_ptr is not None:
                v = _load_chunk(v_rows, 0, token_in, dim, BLOCK_D, EVEN_D)
            scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
            grad_weights = tl.dot(v, tl.trans(grad_out), input_precision=PRECISION)
            if HAS_NORM:
                total_part, squares_part = _channel_sums(k, 0, pivot, dim, BLOCK_N, BLOCK_D, EVEN_D)
                query_part = q.to(tl.float32)
                grad_part = grad_out.to(tl.float32)
        else:
            for offset in range(0, dim, BLOCK_D):
                q = _load_chunk(q_rows, offset, query_in, dim, BLOCK_D, EVEN_D)
                grad_out = _load_chunk(grad_rows, offset, query_in, dim, BLOCK_D, EVEN_D)
                k = _load_chunk(k_rows, offset, token_in, dim, BLOCK_D, EVEN_D)
                v = k
                if v_ptr is not None:
                    v = _load_chunk(v_rows, offset, token_in, dim, BLOCK_D, EVEN_D)
                scores = tl.dot(k, tl.trans(q), scores, input_precision=PRECISION)
                grad_weights = tl.dot(v, tl.trans(grad_out), grad_weights, input_precision=PRECISION)
                if HAS_NORM:
                    more_total, more_squares = _channel_sums(k, offset, pivot, dim, BLOCK_N, BLOCK_D, EVEN_D)
                    total_part += more_total
                    squares_part += more_squares
                    query_part += q.to(tl.float32)
                    grad_part += grad_out.to(tl.float32)
        if HAS_NORM:
            query_sum = tl.sum(query_part, 1)
            grad_sum = tl.sum(grad_part, 1)
            gap = tl.sum(total_part, 1) / dim
            mean = pivot + gap
            variance = tl.maximum(tl.sum(squares_part, 1) / dim - gap * gap, 0.0)
            rstd = tl.where(token_in, tl.rsqrt(variance + norm_eps), 0.0)
            scores = (scores - mean[:, None] * query_sum[None, :]) * rstd[:, None]
            grad_weights = (grad_weights - mean[:, None] * grad_sum[None, :]) * rstd[:, None]

        # The softmax over queries. Padded and absent ones take no share of it. Not `softmax_over_queries`: its second
        # result would wait in registers for the entropy's gradient (it spilled 3 of 48 kernels, up to 96 bytes).
        present = query_in
        if mask_ptr is not None:
            present &= tl.load(mask_ptr + image * num_queries + t, mask=query_in, other=0) != 0
        bias = tl.zeros((BLOCK_T,), tl.float32)
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + row * num_queries + t, mask=query_in, other=0.0) * LOG2E
        logits = scores * (scale * LOG2E) + tl.where(present, bias, float("-inf"))[None, :]
        top = tl.max(logits, 1)
        top = tl.where(top == float("-inf"), 0.0, top)  # an image without a single query
        exps = tl.exp2(logits - top[:, None])
        total = tl.sum(exps, 1)
        total = tl.where(total == 0.0, 1.0, total)
        assignment = exps * tl.where(token_in, 1.0 / total, 0.0)[:, None]

        # eps, mass and their quotient stay fp32: 1e-8 is 0 in fp16 and a query without tokens would give 0 / 0.
        mass = tl.load(mass_ptr + row * num_queries + t, mask=query_in, other=1.0)
        inverse = tl.full((BLOCK_T,), 1.0, tl.float32)
        if NORMALIZE == "mean":
            inverse = 1.0 / (mass + num_tokens * eps)
        elif NORMALIZE == "den":
            inverse = 1.0 / (mass + eps)
        elif NORMALIZE == "l1max":
            inverse = 1.0 / tl.maximum(mass, eps)
        even = eps if NORMALIZE == "mean" else 0.0  # what every token adds to A
        delta = tl.zeros((BLOCK_T,), tl.float32)
        if NORMALIZE != "sum":
            if ONE_BLOCK:  # all of a query's weights are here
                delta = tl.sum((assignment + even) * grad_weights, 0) * inverse
            else:
                delta = out_delta
            if NORMALIZE == "l1max":
                delta = tl.where(mass <= eps, 0.0, delta)

        # The factors, as the products will see them: what the tokens' means take from a sum must use rounded factors,
        # or their rounding times the mean stays in the result (bf16, mean at 5 sigma: error 6.9e-3, not 3.1e-3). Each
        # is stored as soon as it is known: tiles of a token by a query are what fills the registers.
        element = k_ptr.dtype.element_ty
        if coefficients_ptr is not None:
            coefficient_rows = coefficients_ptr + row * num_tokens * (2 * BLOCK_T)
            coefficient_rows += token[:, None] * (2 * BLOCK_T) + t[None, :]
            weights = (assignment + even) * inverse[None, :]
            if NORMALIZE == "mean":
                weights = tl.where(token_in[:, None] & present[None, :], weights, 0.0)
            if HAS_NORM:
                weights *= rstd[:, None]
            second = weights.to(element)
            tl.store(coefficient_rows + BLOCK_T, second, mask=token_in[:, None])
            if affine_ptr is not None:
                average = tl.sum(second.to(tl.float32) * grad_sum[None, :], 1)
                along = tl.sum(second.to(tl.float32) * grad_weights, 1)

        grad_scores = assignment * inverse[None, :] * (grad_weights - delta[None, :])
        if grad_mass_ptr is not None:
            grad_mass = tl.load(grad_mass_ptr + row * num_queries + t, mask=query_in, other=0.0)
            grad_scores += assignment * grad_mass[None, :]
        if grad_map_ptr is not None:
            map_rows = grad_map_ptr + image * map_stride_b + head * map_stride_h
            map_rows += t[None, :] * map_stride_t + token[:, None] * map_stride_n
            map_in = query_in[None, :] & token_in[:, None]
            grad_scores += assignment * tl.load(map_rows, mask=map_in, other=0.0)
        if grad_entropy_ptr is not None:
            # d(-A ln A) / dA = -ln A - 1, and the 1 falls out of dS.
            grad_entropy = tl.load(grad_entropy_ptr + row) * LN2
            log2 = scores * (scale * LOG2E) + bias[None, :] - (top + tl.log2(total))[:, None]
            grad_scores -= tl.where(assignment > 0.0, assignment * log2 * grad_entropy, 0.0)
        grad_scores -= assignment * tl.sum(grad_scores, 1)[:, None]
        if grad_bias_ptr is not None:
            bias_sum += tl.sum(grad_scores, 0)
        grad_scores *= scale
        if HAS_NORM:
            grad_scores *= rstd[:, None]
        first = grad_scores.to(element)
        if coefficients_ptr is not None:
            tl.store(coefficient_rows, first, mask=token_in[:, None])
        if affine_ptr is not None:
            average += tl.sum(first.to(tl.float32) * query_sum[None, :], 1)
            along += tl.sum(first.to(tl.float32) * scores, 1)
            slope = -rstd * along / dim
            affine = affine_ptr + row * num_tokens * 2 + token * 2
            tl.store(affine, -average / dim - slope * mean, mask=token_in)
            tl.store(affine + 1, slope, mask=token_in)

        mean_part = tl.zeros((BLOCK_T,), tl.float32)
        if HAS_NORM:
            mean_part = tl.sum(first.to(tl.float32) * mean[:, None], 0)
        if ONE_CHUNK:
            grad_q = tl.trans(tl.dot(tl.trans(k), first, input_precision=PRECISION)) - mean_part[:, None]
            inside = query_in[:, None] & (d < dim)[None, :]
            _add_rows(grad_q, grad_q_ptr, sums_ptr, sums_rows, inside, step == 0, step == steps - 1)
        else:
            chunks = tl.cdiv(dim, BLOCK_D)
            for chunk in range(chunks):
                offset = (chunks - 1 - chunk) * BLOCK_D
                k = _load_chunk(k_rows, offset, token_in, dim, BLOCK_D, EVEN_D)
                # Channels are the rows of the product: 64 or more, as Hopper's tensor cores ask for, where T may be 16.
                grad_q = tl.trans(tl.dot(tl.trans(k), first, input_precision=PRECISION)) - mean_part[:, None]
                inside = query_in[:, None]
                if not EVEN_D:
                    inside &= (offset + d < dim)[None, :]
                _add_rows(grad_q, grad_q_ptr, sums_ptr, sums_rows + offset, inside, step == 0, step == steps - 1)

    if grad_bias_ptr is not None:
        tl.store(grad_bias_ptr + sums_row * num_queries + t, bias_sum, mask=query_in)
