"""The matrix of logits that the contrastive losses never build, by what it is made of, and what ids mean for it.

    s_ij = scale <I_i, T_j> + b_j      Y_ij = row_weight_i + col_weight_j at a positive, 0 elsewhere

Two words choose among losses, from the public functions down to the kernels. `sides`, what a softmax normalises:
"both" (rows and columns), "rows", or "sigmoid": neither, every pair is a classification of its own. `positives`, what
equal ids mean: "diagonal" (there are none), "all" (every pair of equal ids is a positive, beside the pair itself) or
"mask" (equal ids off the pair count nowhere). contrastive_loss's "soft" and "supcon" are both "all" here.

Equal ids are found by sorting, in O((R + C) log(R + C)) time, without a matrix of labels: the columns that share row
i's id stand next to each other in sorted order. A loss sorts each side once; weights, forward, backward and the blocks
of a rank all read what came of it.

Letters: R rows (images), C columns (texts), D features.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..launch import accumulate_dtype

# exp(s - shift) may not overflow in fp32, nor a sum of millions of them: 2^20 times exp(64) is exp(78), of exp(88).
_LARGEST_EXPONENT = 64.0

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


class Logits(NamedTuple):
    """R x C logits and which of them are positives. `ops.py` says what is computed from them."""

    image: Tensor
    """(R, D)."""
    text: Tensor
    """(C, D), in the images' dtype."""
    scale: Tensor
    """One element."""
    bias: Tensor | None
    """(C,)."""
    row_match: Tensor | None
    """Of `Matches`, as is `col_match`; None where positives are "diagonal"."""
    col_match: Tensor | None
    row_weight: Tensor
    """(R,) from `positive_weights`: the label Y_ij of a positive is row_weight_i + col_weight_j."""
    col_weight: Tensor
    """(C,)."""
    shift: Tensor
    """(1,) from `safe_shift`."""
    offset: int
    """Row i is paired with column offset + i, if that exists."""
    sides: str
    """"both", "rows" or "sigmoid"."""
    positives: str
    """"diagonal", "all" or "mask"."""

    @property
    def matches(self) -> Matches | None:
        """Where equal ids stand."""
        return None if self.row_match is None or self.col_match is None else Matches(self.row_match, self.col_match)

    @property
    def codes(self) -> tuple[Tensor | None, Tensor | None]:
        """(R,) and (C,), equal where ids are; None without ids."""
        return (None, None) if self.matches is None else (self.matches.rows[CODE], self.matches.cols[CODE])

    def of_columns(self, columns: slice, text: Tensor, offset: int) -> "Logits":
        """The logits of some columns, `text` of which is given. offset: as of these columns alone."""
        row_match, col_match = (None, None) if self.matches is None else self.matches.of_columns(columns)
        return self._replace(
            text=text,
            bias=None if self.bias is None else self.bias[columns],
            row_match=row_match,
            col_match=col_match,
            col_weight=self.col_weight[columns],
            offset=offset,
        )


class Wanted(NamedTuple):
    """Which gradients of the total are asked for. What none of them needs is not computed."""

    image: bool
    text: bool
    scale: bool
    bias: bool

    @property
    def from_rows(self) -> bool:
        """Whether G T is needed: for the images, or, where the texts want nothing, for the scale."""
        return self.image or (self.scale and not self.text)


def find_matches(row_ids: Tensor, col_ids: Tensor, positives: str = "all") -> Matches:
    """row_ids (R,), col_ids (C,) int64. For "mask" codes alone are needed, and so a single sort."""
    cols, col_order = col_ids.sort(stable=True)
    row_start, row_end = _range_in(cols, row_ids)
    row_code = torch.where(row_start < row_end, row_start, -1)
    col_code = torch.searchsorted(cols, col_ids, out_int32=True)
    if positives == "mask":
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
    image: Tensor, num_cols: int, matches: Matches | None, offset: int, sides: str, positives: str
) -> tuple[Tensor, Tensor]:
    """Return row_weight (R,) and col_weight (C,): the label Y_ij of a positive is their sum, elsewhere it is 0.

    matches: of all rows that the columns count; R is their number, or without them that of `image`. offset: as in
    `Logits`. Weights are 1 / n_i and 1 / n_j for "both", 1 / n_i and 0 for "rows", 1 and 0 for "sigmoid".
    """
    compute = accumulate_dtype(image.dtype)
    both = sides == "both"
    if matches is None or positives != "all" or sides == "sigmoid":
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


def magnitudes(image: Tensor, text: Tensor, bias: Tensor | None) -> Tensor:
    """(3,) the largest norm of an image, of a text, and the largest bias; -inf or 0 where there is none."""
    compute = accumulate_dtype(image.dtype)
    found = [
        torch.linalg.vector_norm(x, dim=1, dtype=compute).amax() if x.shape[0] else x.new_zeros((), dtype=compute)
        for x in (image, text)
    ]
    largest = image.new_zeros((), dtype=compute)
    if bias is not None:
        largest = bias.to(compute).amax() if bias.shape[0] else image.new_full((), -torch.inf, dtype=compute)
    return torch.stack([*found, largest])


def safe_shift(largest: Tensor, scale: Tensor, sides: str) -> Tensor:
    """(1,) what is subtracted from every logit so that exp() cannot overflow, from `magnitudes`; often 0.

    |<I, T>| <= |I| |T| bounds the logits. Where that bound is so loose that sums underflow, the kernels notice and
    compute with the largest logits instead. A sigmoid saturates, and knows no shift.
    """
    image, text, bias = largest.unbind()
    bound = scale.to(largest.dtype).reshape(()).abs() * image * text + bias
    return (bound - (torch.inf if sides == "sigmoid" else _LARGEST_EXPONENT)).clamp_min(0.0).reshape(1)
