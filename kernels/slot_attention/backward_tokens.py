"""The kernel that multiplies out the tokens' gradient from the factors that slot attention's backward leaves.

    dE_n = sum over calls and heads of  sum_t C1_nt q_t + C2_nt dout_t  (+ offset_n + slope_n E_n, LayerNorm's share)

All calls that share the tokens are summed in registers, in fp32, and dE is written once. Autograd would write it per
call and add: at T = 20, N = 196, D = 768 the factors of a call are 0.3 of the bytes of one dE, and its sums 3 dE.

Letters as in __init__.py.
"""

import triton
import triton.language as tl


@triton.jit
def _pick(pointers, index):
    """pointers[index], where index is known only when the kernel runs."""
    pointer = pointers[0]
    for i in tl.static_range(1, len(pointers)):
        pointer = tl.where(index == i, pointers[i], pointer)
    return pointer


@triton.jit
def slot_attention_token_gradient_kernel(
    coefficients_ptrs,  # tuples with an entry per call
    q_ptrs,
    grad_out_ptrs,
    affine_ptrs,
    tokens_ptr,
    grad_ptr,
    q_stride_b,
    q_stride_h,
    q_stride_t,
    grad_out_stride_b,
    grad_out_stride_h,
    grad_out_stride_t,
    tokens_stride_b,
    tokens_stride_g,
    tokens_stride_n,
    groups,
    heads_per_group,
    num_queries,
    num_tokens,
    dim,
    chunks_per_program,
    WITH_QUERIES: tl.constexpr,
    WITH_GRAD_OUTS: tl.constexpr,
    ONE_ENTRY: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # Neighbouring programs share coefficients, then queries.
    chunks = tl.cdiv(dim, BLOCK_D)
    splits = tl.cdiv(chunks, chunks_per_program)
    num_blocks = tl.cdiv(num_tokens, BLOCK_N)
    split = tl.program_id(0) % splits
    block = tl.program_id(0) // splits % num_blocks
    row = (tl.program_id(0) // splits // num_blocks).to(tl.int64)  # image * groups + group; B N D passes 2**31
    image = row // groups
    group = row % groups
    t = tl.arange(0, BLOCK_T)
    token = block * BLOCK_N + tl.arange(0, BLOCK_N)
    query_in = t < num_queries
    token_in = token < num_tokens
    first_head = group * heads_per_group
    first_row = (image * groups * heads_per_group + first_head) * num_tokens  # of coefficients and affine
    factors = token[:, None] * (2 * BLOCK_T) + t[None, :]
    entries = len(coefficients_ptrs) * heads_per_group

    intercept = tl.zeros((BLOCK_N,), tl.float32)
    slope = tl.zeros((BLOCK_N,), tl.float32)
    if affine_ptrs is not None:
        for entry in range(entries):
            affine = _pick(affine_ptrs, entry // heads_per_group)
            affine += (first_row + entry % heads_per_group * num_tokens) * 2 + token * 2
            intercept += tl.load(affine, mask=token_in, other=0.0)
            slope += tl.load(affine + 1, mask=token_in, other=0.0)

    coefficients = coefficients_ptrs[0] + first_row * (2 * BLOCK_T)
    if ONE_ENTRY:
        first = tl.load(coefficients + factors, mask=token_in[:, None], other=0.0)
        second = tl.load(coefficients + factors + BLOCK_T, mask=token_in[:, None], other=0.0)
    grad = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    first_chunk = split * chunks_per_program
    own_chunks = tl.minimum(chunks_per_program, chunks - first_chunk)
    # One loop over channel chunks and, within them, the entries of the sum: loads run ahead across chunks too.
    for step in range(own_chunks if ONE_ENTRY else own_chunks * entries):
        channel = (first_chunk + (step if ONE_ENTRY else step // entries)) * BLOCK_D + tl.arange(0, BLOCK_D)
        entry = 0 if ONE_ENTRY else step % entries
        call = 0 if ONE_ENTRY else entry // heads_per_group
        member = 0 if ONE_ENTRY else entry % heads_per_group
        head = first_head + member
        channel_in = channel < dim
        rows_in = query_in[:, None]
        tile_in = token_in[:, None]
        if not EVEN_D:
            rows_in &= channel_in[None, :]
            tile_in &= channel_in[None, :]
        if not ONE_ENTRY:
            coefficients = _pick(coefficients_ptrs, call) + (first_row + member * num_tokens) * (2 * BLOCK_T)
        if ONE_ENTRY:
            grad = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        if affine_ptrs is not None:  # early: while it comes, the products run
            tokens_rows = tokens_ptr + image * tokens_stride_b + group * tokens_stride_g
            tokens_rows += token[:, None] * tokens_stride_n + channel[None, :]
            tokens = tl.load(tokens_rows, mask=tile_in & (ONE_ENTRY or entry == entries - 1), other=0.0)
        if WITH_QUERIES:
            if not ONE_ENTRY:
                first = tl.load(coefficients + factors, mask=token_in[:, None], other=0.0)
            q_rows = _pick(q_ptrs, call) + image * q_stride_b + head * q_stride_h
            q = tl.load(q_rows + (t[:, None] * q_stride_t + channel[None, :]), mask=rows_in, other=0.0)
            grad = tl.dot(first, q, grad, input_precision=PRECISION)
        if WITH_GRAD_OUTS:
            if not ONE_ENTRY:
                second = tl.load(coefficients + factors + BLOCK_T, mask=token_in[:, None], other=0.0)
            grad_rows = _pick(grad_out_ptrs, call) + image * grad_out_stride_b + head * grad_out_stride_h
            grad_out = tl.load(grad_rows + (t[:, None] * grad_out_stride_t + channel[None, :]), mask=rows_in, other=0.0)
            grad = tl.dot(second, grad_out, grad, input_precision=PRECISION)
        if ONE_ENTRY or entry == entries - 1:
            result = grad
            if affine_ptrs is not None:
                result += intercept[:, None] + slope[:, None] * tokens.to(tl.float32)
            result_rows = grad_ptr + row * num_tokens * dim + (token[:, None] * dim + channel[None, :])
            tl.store(result_rows, result.to(grad_ptr.dtype.element_ty), mask=tile_in)
            grad = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
