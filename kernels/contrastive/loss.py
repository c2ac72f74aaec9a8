"""Contrastive (InfoNCE) loss over all pairs of a batch in memory linear in the batch, exact over any number of ranks.

    s_ij = scale <I_i, T_j> + b_j
    loss = (sum_i logsumexp_j s_ij + sum_j logsumexp_i s_ij - sum_ij Y_ij s_ij) / 2B,   Y_ij = m_ij (1 / n_i + 1 / n_j)

m_ij marks the positives (n_i of row i, n_j of column j): the pair itself, or every pair of equal ids. The B x B matrix
is never in memory in fp32: a tile of logits is made, reduced to row and column sums and dropped; the backward makes it
again, or, on a GPU and while that is small, reads exp(s) kept in bf16 (ops.py). Traffic saved: the eager
loss writes and reads the logits, both log-softmaxes and the gradients of each, about 6 B^2 numbers (26 GB in fp32 at
B = 32768). Over ranks, ONE tower is gathered, and column sums, B numbers, are all-reduced (ranks.py).

Sources: symmetric InfoNCE of CLIP (arXiv 2103.00020); label matrix of e-CLIP (arXiv 2207.00208); mean over positives
outside the logarithm of SupCon (arXiv 2004.11362).

Letters: B pairs (of all ranks), D features.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from ..launch import accumulate_dtype, autocast_dtype, autocast_off
from .arguments import (
    as_one_number,
    check_devices,
    check_features,
    check_ids,
    check_option,
    check_rows_per_rank,
    num_ranks,
)
from .ops import pair_loss
from .ranks import rank_share

Positives = Literal["diagonal", "soft", "mask", "supcon"]
Sides = Literal["both", "rows"]

# 2 R C bytes buy a backward of two matrix products instead of three. 2.1 GB: a batch of 32768 on one GPU.
KEEP_BYTES = 2**31


def contrastive_loss_reference(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    *,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    positives: Positives = "diagonal",
    bias: Tensor | None = None,
    sides: Sides = "both",
) -> Tensor:
    """The specification of `contrastive_loss`, without a process group: builds the whole matrix of logits.

    Shapes, meanings and errors as there. Computes in fp32, or in fp64 if the features are fp64, under autocast too.
    """
    scale, image_ids, text_ids = _check(
        image_features, text_features, logit_scale, image_ids, text_ids, positives, bias, sides
    )
    compute = accumulate_dtype(image_features.dtype)
    with autocast_off(image_features):
        image, text = image_features.to(compute), text_features.to(compute)
        if sides == "rows":
            text = text.detach()
        logits = scale.to(compute).reshape(()) * (image @ text.T)
        if bias is not None:
            logits = logits + bias.to(compute)
        positive = torch.eye(*logits.shape, dtype=torch.bool, device=logits.device)
        if image_ids is not None and text_ids is not None:
            same = image_ids[:, None] == text_ids[None, :]
            if positives == "mask":
                logits = logits.masked_fill(same & ~positive, -torch.inf)
            else:
                positive = positive | same
        losses = []
        for dim in (1, 0) if sides == "both" else (1,):
            log_p = logits.log_softmax(dim).masked_fill(~positive, 0.0)
            losses.append(-(log_p.sum(dim) / positive.sum(dim)).mean())
        return torch.stack(losses).mean()


def contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    *,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    positives: Positives = "diagonal",
    bias: Tensor | None = None,
    sides: Sides = "both",
    group: dist.ProcessGroup | None = None,
    rows_per_rank: Sequence[int] | None = None,
    keep_bytes: int = KEEP_BYTES,
) -> Tensor:
    """InfoNCE of a batch of pairs in memory linear in the batch; a scalar in fp32 (fp64 for fp64 features).

    image_features: (B, D), text_features: (B, D): one floating dtype, used as given (normalise before). Pair i is
        image i with text i. With sides="rows" there may be more texts than images; the further ones are negatives.
        Under autocast they are taken in its dtype, as operands of a matmul are; everything after is fp32.
    logit_scale: one element, multiplies the inner products (1 / temperature); differentiable if a tensor.
    image_ids, text_ids: (B,) integers naming the product or catalogue entry of a row; text_ids defaults to image_ids.
    positives: what equal ids mean.
        "diagonal": no ids; row i's positive is column i.
        "soft": e-CLIP's label matrix: the target mass of a row (column) is shared equally by its positives.
        "mask": equal ids off the pair are neither positives nor negatives.
        "supcon": mean over positives of -log p. With one pair per row this is the same function as "soft".
    bias: (B,) of the texts, added to their column of logits (for example -log of the sampling probability); finite.
    sides: "both" is the mean of image-to-text and text-to-image; "rows" is image-to-text alone against fixed keys:
        text_features gets no gradient.
    group: every rank of it passes its own rows, as many as it has, even none. Returned is this rank's share: its mean
        over ranks, and the mean over ranks of the gradients, are those of one process with all rows. Every rank must
        agree on the options and on which inputs require gradients, and scale its share alike before backward.
    rows_per_rank: how many pairs each rank of the group passes, where that is known (then images and texts are equally
        many). Without it the ranks exchange their counts first, and the host waits for the device to read them.
    keep_bytes: with gradients wanted, bf16 features and a GPU, exp(s) is kept for the backward if it fits in so many
        bytes, two a logit of this rank, rows counted by 128 and columns by 256. 0: never; memory is then linear in the
        batch at every size. Over ranks, only by those whose texts begin and end at multiples of 256.

    Raises ValueError for wrong shapes, dtypes, devices or options; on CPU also for a non-finite logit_scale (on a GPU
    the check of a tensor would wait for the device; the loss is then not finite).
    """
    scale, image_ids, text_ids = _check(
        image_features, text_features, logit_scale, image_ids, text_ids, positives, bias, sides, group
    )
    check_rows_per_rank(rows_per_rank, image_features, text_features, group)
    image, text = (x.to(autocast_dtype(x)) for x in (image_features, text_features))
    if sides == "rows":
        text = text.detach()
    if not (torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (image, text, scale, bias))):
        keep_bytes = 0
    # Both make a positive of every pair of equal ids, which share their row's and their column's target.
    which = "all" if positives in ("soft", "supcon") else positives
    pairs = (image, text, scale, bias, image_ids, text_ids, sides, which)
    if group is not None and num_ranks(group) > 1:
        return rank_share(*pairs, group, rows_per_rank, keep_bytes)
    return pair_loss(*pairs, keep_bytes)


def _check(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    positives: str,
    bias: Tensor | None,
    sides: str,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the scale as a tensor and both ids as int64."""
    check_option("positives", positives, get_args(Positives))
    check_option("sides", sides, get_args(Sides))
    scale = as_one_number("logit_scale", logit_scale, image)
    check_devices(
        image_features=image, text_features=text, logit_scale=scale, bias=bias, image_ids=image_ids, text_ids=text_ids
    )
    check_features(image, text, more_texts=sides == "rows", may_be_empty=num_ranks(group) > 1)
    if bias is not None and (bias.shape != text.shape[:1] or not bias.is_floating_point()):
        raise ValueError(f"bias {tuple(bias.shape)} of {bias.dtype} must be ({text.shape[0]},) floats, one a text")
    image_ids, text_ids = check_ids(positives, image_ids, text_ids, image, text)
    return scale, image_ids, text_ids
