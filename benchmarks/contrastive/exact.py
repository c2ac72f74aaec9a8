"""The contrastive loss in float64: its value, the scale's gradient, and the features' gradients at sampled rows.

Written apart from the kernels and their reference. A block of rows at a time against all columns, so that 131072 pairs
fit a GPU; no shift is needed: exp(117) and its sums are ordinary numbers in float64.

    dI_i = scale / n sum_j (e_ij / R_i + e_ij / C_j - Y_ij) T_j,    e = exp(scale z), z_ij = <I_i, T_j>

R and C are row and column sums of e, Y the targets' mass, n the number of softmaxes; one direction alone lacks C.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

BLOCK = 2**26  # numbers of a block: 512 MiB


class Exact(NamedTuple):
    """float64; image and text are gradients at the sampled rows."""

    loss: Tensor
    image: Tensor
    text: Tensor
    scale: Tensor


class _Problem(NamedTuple):
    image: Tensor
    text: Tensor
    scale: float
    ids: Tensor | None
    counts: Tensor
    """How many rows share a row's id."""
    masked: bool
    both: bool

    def block(self, rows: Tensor, cols: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z, e and Y of some rows and columns, given as indices."""
        inner = self.image[rows] @ self.text[cols].T
        mass = (inner * self.scale).exp_()
        paired = rows[:, None] == cols
        if self.ids is None:
            return inner, mass, paired * (1.0 + self.both)
        same = self.ids[rows][:, None] == self.ids[cols]
        if self.masked:
            return inner, mass.masked_fill_(same & ~paired, 0.0), paired * (1.0 + self.both)
        return inner, mass, same * (1 / self.counts[rows][:, None] + self.both / self.counts[cols])


def exact_loss(
    image: Tensor,
    text: Tensor,
    scale: float,
    sample: Tensor,
    *,
    ids: Tensor | None = None,
    positives: Literal["diagonal", "soft", "mask"] = "diagonal",
    both: bool = True,
) -> Exact:
    """Features (B, D) as they are, cast up; `sample`: indices of rows; `both`: the mean of both directions."""
    batch = len(image)
    counts = torch.ones(batch, dtype=torch.float64, device=image.device)
    if ids is not None:
        counts = torch.bincount(ids)[ids].double()
    problem = _Problem(image.double(), text.double(), scale, ids, counts, positives == "mask", both)
    everything = torch.arange(batch, device=image.device)
    row_sum, row_moment, col_sum, col_moment = image.new_zeros((4, batch), dtype=torch.float64).unbind()
    matched = image.new_zeros((), dtype=torch.float64)
    for rows in everything.split(max(1, BLOCK // batch)):
        inner, mass, target = problem.block(rows, everything)
        matched += (target * inner).sum()
        row_sum[rows] = mass.sum(1)
        col_sum += mass.sum(0)
        weighted = inner.mul_(mass)
        row_moment[rows] = weighted.sum(1)
        col_moment += weighted.sum(0)
    sides = 2 if both else 1
    loss = row_sum.log().sum() - scale * matched
    grad_scale = (row_moment / row_sum).sum() - matched
    if both:
        loss += col_sum.log().sum()
        grad_scale += (col_moment / col_sum).sum()
    col_share = 1 / col_sum if both else torch.zeros_like(col_sum)

    def weights(rows: Tensor, cols: Tensor) -> Tensor:
        _, mass, target = problem.block(rows, cols)
        found: Tensor = mass * (1 / row_sum[rows][:, None] + col_share[cols]) - target
        return found

    factor = 1 / (sides * batch)
    return Exact(
        loss * factor,
        weights(sample, everything) @ problem.text * (scale * factor),
        weights(everything, sample).T @ problem.image * (scale * factor),
        grad_scale * factor,
    )
