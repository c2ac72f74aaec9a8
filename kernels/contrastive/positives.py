"""Which pairs count as positives, how much, and where they stand: what ids mean, without a matrix of labels.

m_ij marks the positives of `contrastive_loss`. Equal ids are found by sorting, in O((R + C) log(R + C)) time: the
columns that share row i's id stand next to each other in sorted order. A loss sorts each side once; weights, forward,
backward and the blocks of a rank all read what came of it.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..launch import accumulate_dtype

CODE, START, END, ORDER = range(4)
"""Lines of `Matches`."""


class Matches(NamedTuple):
    """Where equal ids of R rows and C columns stand: int32, the lines below a side, or the first alone.

    CODE: a row and a column carry one id where their codes are equal; -1 of rows whose id no column has.
    START, END: the columns of row i's id are cols[ORDER, rows[START, i] : rows[END, i]]; the rows of a column likewise.
    ORDER: the side's own indices sorted by id, equal ones in their order.
    """

    rows: Tensor
    """(4, R) or (1, R)."""
    cols: Tensor
    """(4, C) or (1, C)."""

    def of_rows(self, kept: slice) -> "Matches":
        """The same of some rows alone; codes stay, ranges are of those rows."""
        rows, cols = _kept_of(self.rows, self.cols, kept)
        return Matches(rows, cols)

    def of_columns(self, kept: slice) -> "Matches":
        cols, rows = _kept_of(self.cols, self.rows, kept)
        return Matches(rows, cols)


def _kept_of(side: Tensor, other: Tensor, kept: slice) -> tuple[Tensor, Tensor]:
    """Both sides after all but `kept` of `side` are dropped. No sort: what stays of an order stays in order."""
    if len(side) == 1:
        return side[:, kept], other
    inside = (side[ORDER] >= kept.start) & (side[ORDER] < kept.stop)
    before = F.pad(inside.cumsum(0, dtype=torch.int32), (1, 0))
    # The k-th that is inside, by a search: a mask would make the host wait for their number, which is known.
    count = torch.arange(1, kept.stop - kept.start + 1, device=side.device, dtype=torch.int32)
    places = torch.searchsorted(before[1:], count)
    side = torch.cat([side[:ORDER, kept], (side[ORDER, places] - kept.start)[None]])
    return side, torch.stack([other[CODE], before[other[START]], before[other[END]], other[ORDER]])


def find_matches(row_ids: Tensor, col_ids: Tensor, mode: str = "share") -> Matches:
    """row_ids (R,), col_ids (C,) int64. Mode "mask" needs codes alone, and so a single sort."""
    cols, col_order = col_ids.sort(stable=True)
    row_start, row_end = _range_in(cols, row_ids)
    row_code = torch.where(row_start < row_end, row_start, -1)
    col_code = torch.searchsorted(cols, col_ids, out_int32=True)
    if mode == "mask":
        return Matches(row_code[None], col_code[None])
    rows, row_order = row_ids.sort(stable=True)
    of_rows = (row_code, row_start, row_end, row_order.int())
    of_cols = (col_code, *_range_in(rows, col_ids), col_order.int())
    return Matches(torch.stack(of_rows), torch.stack(of_cols))


def _range_in(among: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """First and one past the last place of each of `ids` (n,) in the sorted `among` (m,); int32."""
    start = torch.searchsorted(among, ids, out_int32=True)
    return start, torch.searchsorted(among, ids, right=True, out_int32=True)


def positive_weights(
    image: Tensor, num_cols: int, matches: Matches | None, offset: int, kind: str, mode: str
) -> tuple[Tensor, Tensor]:
    """Return row_weight (R,) and col_weight (C,): the label Y_ij of a positive is their sum, elsewhere it is 0.

    matches: of all rows that the columns count; R is their number, or without them that of `image`. offset, kind and
    mode as in contrastive_ops.py. 1 / n_i and 1 / n_j where both sides count; 1 / n_i and 0 for kind "rows"; 1 and 0
    for "sigmoid".
    """
    compute = accumulate_dtype(image.dtype)
    both = kind == "both"
    if matches is None or mode != "share" or kind == "sigmoid":
        num_rows = image.shape[0] if matches is None else matches.rows.shape[1]
        ones = image.new_ones((num_rows,), dtype=compute)
        return ones, image.new_full((num_cols,), float(both), dtype=compute)
    rows, cols = matches
    # The pair itself is a positive even where its two ids differ, so no row and no column is without one.
    unlike = rows[CODE] != cols[CODE, offset : offset + rows.shape[1]]
    row_weight = (rows[END] - rows[START] + unlike).to(compute).reciprocal()
    if not both:
        return row_weight, image.new_zeros((num_cols,), dtype=compute)
    return row_weight, (cols[END] - cols[START] + unlike).to(compute).reciprocal()
