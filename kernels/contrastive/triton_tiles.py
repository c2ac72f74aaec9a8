"""Device functions that the kernels of the contrastive losses share: a tile of logits in registers, and sums of exp.

Letters, shapes and `shift` are those of ops.py and problem.py. Logits are in units of log 2 there, as exp2 wants them:
exp(s - shift) = exp2(x), x = acc * (scale * log2 e) + (bias - shift) * log2 e, one multiply-add an element.
"""

import triton
import triton.language as tl

from ..launch import LOG2E


@triton.jit
def products(
    image_ptr,
    text_ptr,
    first_row,
    first_col,
    num_rows,
    num_cols,
    image_stride,
    text_stride,
    dim,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """fp32 inner products of BLOCK_R images and BLOCK_C texts from the given ones on, garbage beyond the last of them.

    Returned are the left and the right half of the tile, (BLOCK_R, BLOCK_C / 2) each: what follows goes through them
    one after the other and needs registers for half a tile beside the sums.
    """
    # Indices beyond the end read the last row: no masks, which would cost a predicate for every load.
    row = tl.minimum(tl.arange(0, BLOCK_R), num_rows - 1 - first_row)
    left_col = tl.minimum(tl.arange(0, BLOCK_C // 2), num_cols - 1 - first_col)
    right_col = tl.minimum(BLOCK_C // 2 + tl.arange(0, BLOCK_C // 2), num_cols - 1 - first_col)
    d = tl.arange(0, BLOCK_D)
    image_at = image_ptr + tl.cast(first_row, tl.int64) * image_stride + row[:, None] * image_stride + d[None, :]
    text_at = text_ptr + tl.cast(first_col, tl.int64) * text_stride + d[:, None]
    left_at, right_at = text_at + left_col[None, :] * text_stride, text_at + right_col[None, :] * text_stride
    left = tl.zeros((BLOCK_R, BLOCK_C // 2), tl.float32)
    right = tl.zeros((BLOCK_R, BLOCK_C // 2), tl.float32)
    for start in range(0, dim, BLOCK_D):
        image = tl.load(image_at + start)
        left_text = tl.load(left_at + start)
        right_text = tl.load(right_at + start)
        left = tl.dot(image, left_text, left, input_precision=PRECISION)
        right = tl.dot(image, right_text, right, input_precision=PRECISION)
    return left, right


@triton.jit
def column_offsets(bias_ptr, col, num_cols, shift, HAS_BIAS: tl.constexpr):
    """(bias - shift) in units of log 2; -inf beyond the last column, so that exp2 is 0 there."""
    offset = tl.zeros_like(col).to(tl.float32) - shift
    if HAS_BIAS:
        offset += tl.load(bias_ptr + col, mask=col < num_cols, other=0.0).to(tl.float32)
    return tl.where(col < num_cols, offset * LOG2E, float("-inf"))


@triton.jit
def same_ids(row_code_ptr, col_code_ptr, row, col, num_rows, num_cols):
    """(BLOCK_R, BLOCK_C) whether row and column carry one id; False beyond the end."""
    row_code = tl.load(row_code_ptr + row, mask=row < num_rows, other=-1)
    col_code = tl.load(col_code_ptr + col, mask=col < num_cols, other=-2)
    return row_code[:, None] == col_code[None, :]


@triton.jit
def row_factor(stat_ptr, index, count, shift):
    """exp(shift - stat): what exp(s - shift) is multiplied with to be a probability; 0 beyond the end."""
    stat = tl.load(stat_ptr + index, mask=index < count, other=float("inf"))
    return tl.exp2((shift - stat) * LOG2E)


@triton.jit
def no_positives(
    gradient,
    row_code_ptr,
    col_code_ptr,
    row,
    col,
    num_rows,
    num_cols,
    offset,
    MATCH: tl.constexpr,
):
    """`gradient` with 0 at the pairs and, with MATCH, wherever ids are equal: positives, or pairs that do not count."""
    gradient = tl.where((row + offset)[:, None] == col[None, :], 0.0, gradient)
    if MATCH:
        same = same_ids(row_code_ptr, col_code_ptr, row, col, num_rows, num_cols)
        gradient = tl.where(same, 0.0, gradient)
    return gradient


@triton.jit
def store_tile(ptr, stride, first_row, first_col, values):
    """Write a tile into a matrix whose memory has its `padded_shape`, in the matrix's dtype."""
    row, col = tl.arange(0, values.shape[0]), tl.arange(0, values.shape[1])
    at = ptr + tl.cast(first_row, tl.int64) * stride + first_col + row[:, None] * stride + col[None, :]
    tl.store(at, values.to(ptr.dtype.element_ty))


@triton.jit
def finite(largest):
    """`largest`, or 0 where it is -inf: a row without any term has no shift, and with 0 its sum is 0 instead of NaN."""
    return tl.where(largest == float("-inf"), 0.0, largest)


@triton.jit
def log_of_sum(shift, total):
    """shift + ln(total), -inf where total is 0; a NaN stays one."""
    return tl.where(total == 0.0, float("-inf"), shift + tl.log(tl.where(total == 0.0, 1.0, total)))
