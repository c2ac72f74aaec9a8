"""The matrix of logits that the contrastive losses never build, by what it is made of; and the shift of its exp().

    s_ij = scale <I_i, T_j> + b_j

Letters: R rows (images), C columns (texts), D features.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..launch import accumulate_dtype
from .positives import CODE, Matches

# exp(s - shift) may not overflow in fp32, nor a sum of millions of them: 2^20 times exp(64) is exp(78), of exp(88).
_LARGEST_EXPONENT = 64.0


class Logits(NamedTuple):
    """R x C logits and which of them are positives. `contrastive_ops.py` says what is computed from them."""

    image: Tensor
    """(R, D)."""
    text: Tensor
    """(C, D), in the images' dtype."""
    scale: Tensor
    """One element."""
    bias: Tensor | None
    """(C,)."""
    row_match: Tensor | None
    """Of `Matches`, as is `col_match`; None with mode "diagonal"."""
    col_match: Tensor | None
    row_weight: Tensor
    """(R,) from `positive_weights`: the label Y_ij of a positive is row_weight_i + col_weight_j."""
    col_weight: Tensor
    """(C,)."""
    shift: Tensor
    """(1,) from `safe_shift`."""
    offset: int
    """Row i is paired with column offset + i, if that exists."""
    kind: str
    """"both", "rows" or "sigmoid"."""
    mode: str
    """What equal ids mean: "diagonal" (there are none), "share" (they are positives), "mask" (equal ids off the pair
    count nowhere)."""

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


def safe_shift(largest: Tensor, scale: Tensor, kind: str) -> Tensor:
    """(1,) what is subtracted from every logit so that exp() cannot overflow, from `magnitudes`; often 0.

    |<I, T>| <= |I| |T| bounds the logits. Where that bound is so loose that sums underflow, the kernels notice and
    compute with the largest logits instead. A sigmoid saturates, and knows no shift.
    """
    image, text, bias = largest.unbind()
    bound = scale.to(largest.dtype).reshape(()).abs() * image * text + bias
    return (bound - (torch.inf if kind == "sigmoid" else _LARGEST_EXPONENT)).clamp_min(0.0).reshape(1)
