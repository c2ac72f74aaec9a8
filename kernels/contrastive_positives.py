"""Which pairs count as positives, how much, and where they stand: what ids mean, without a matrix of labels.

m_ij marks the positives of `contrastive_loss`. Equal ids are found by sorting, in O((R + C) log(R + C)) time: the
columns that share row i's id stand next to each other in sorted order.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ._launch import accumulate_dtype


class Matches(NamedTuple):
    """Where equal ids of R rows and C columns stand. All int32 but `order`s."""

    row_code: Tensor
    """(R,) equal to `col_code` of the columns with the row's id; -1 where there is none."""
    col_code: Tensor
    """(C,) >= 0."""
    row_start: Tensor
    """(R,) the columns of the row's id are col_order[row_start:row_end]."""
    row_end: Tensor
    col_order: Tensor
    """(C,) int64 columns sorted by id."""
    col_start: Tensor
    """(C,) the rows of the column's id are row_order[col_start:col_end]."""
    col_end: Tensor
    row_order: Tensor
    """(R,) int64 rows sorted by id."""


def find_matches(row_ids: Tensor, col_ids: Tensor) -> Matches:
    """row_ids (R,), col_ids (C,) int64."""
    rows, row_order = row_ids.sort(stable=True)
    cols, col_order = col_ids.sort(stable=True)
    row_start, row_end = _range_in(cols, row_ids)
    col_start, col_end = _range_in(rows, col_ids)
    row_code = torch.where(row_start < row_end, row_start, -1)
    col_code = torch.searchsorted(cols, col_ids, out_int32=True)
    return Matches(row_code, col_code, row_start, row_end, col_order, col_start, col_end, row_order)


def _range_in(among: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """First and one past the last place of each of `ids` (n,) in the sorted `among` (m,); int32."""
    start = torch.searchsorted(among, ids, out_int32=True)
    return start, torch.searchsorted(among, ids, right=True, out_int32=True)


def positive_weights(
    image: Tensor, num_cols: int, ids: tuple[Tensor, Tensor, Tensor] | None, offset: int, kind: str, mode: str
) -> tuple[Tensor, Tensor]:
    """Return row_weight (R,) and col_weight (C,): the label Y_ij of a positive is their sum, elsewhere it is 0.

    ids: of the rows, of the rows of all ranks, and of the columns. offset, kind and mode as in contrastive_ops.py.
    1 / n_i and 1 / n_j where both sides count; 1 / n_i and 0 for kind "rows"; 1 and 0 for "sigmoid".
    """
    compute = accumulate_dtype(image.dtype)
    num_rows = image.shape[0]
    both = kind == "both"
    if ids is None or mode != "share" or kind == "sigmoid":
        ones = image.new_ones((num_rows,), dtype=compute)
        return ones, image.new_full((num_cols,), float(both), dtype=compute)
    row_ids, all_row_ids, col_ids = ids
    # The pair itself is a positive even where its two ids differ, so no row and no column is without one.
    row_count = _count(row_ids, col_ids) + (row_ids != col_ids[offset : offset + num_rows])
    if not both:
        return row_count.to(compute).reciprocal(), image.new_zeros((num_cols,), dtype=compute)
    col_count = _count(col_ids, all_row_ids) + (col_ids != all_row_ids)
    return row_count.to(compute).reciprocal(), col_count.to(compute).reciprocal()


def _count(ids: Tensor, among: Tensor) -> Tensor:
    """How often each of `ids` (n,) occurs in `among` (m,)."""
    start, end = _range_in(among.sort().values, ids)
    return end - start
