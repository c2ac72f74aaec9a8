"""Contrastive (InfoNCE) loss over all pairs of a batch in memory linear in the batch, exact over any number of ranks.

    s_ij = scale <I_i, T_j> + b_j
    loss = (sum_i logsumexp_j s_ij + sum_j logsumexp_i s_ij - sum_ij Y_ij s_ij) / 2B,   Y_ij = m_ij (1 / n_i + 1 / n_j)

m_ij marks the positives (n_i of row i, n_j of column j): the pair itself, or every pair of equal ids. The B x B matrix
is never in memory: a tile of logits is made, reduced to row and column statistics and dropped; the backward makes it
again (contrastive_statistics.py). Traffic saved: the eager loss writes and reads the logits, both log-softmaxes and the
gradients of each, about 6 B^2 numbers (26 GB in fp32 at B = 32768). Over ranks, ONE tower is gathered, and column
statistics, B numbers, are all-reduced (contrastive_distributed.py).

Sources: symmetric InfoNCE of CLIP (arXiv 2103.00020); label matrix of e-CLIP (arXiv 2207.00208); mean over positives
outside the logarithm of SupCon (arXiv 2004.11362).

Letters: B pairs (of all ranks), D features.
"""

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from ._launch import accumulate_dtype, autocast_off
from .contrastive_distributed import group_share
from .contrastive_statistics import logit_statistics, positive_weights

Positives = Literal["diagonal", "soft", "mask", "supcon"]
Sides = Literal["both", "rows"]


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

    Shapes, meanings and errors as there. Computes in fp32, or in fp64 if the features are fp64.
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
) -> Tensor:
    """InfoNCE of a batch of pairs in memory linear in the batch; a scalar in fp32 (fp64 for fp64 features).

    image_features: (B, D), text_features: (B, D): one floating dtype, used as given (normalise before). Pair i is
        image i with text i. With sides="rows" there may be more texts than images; the further ones are negatives.
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

    Raises ValueError for wrong shapes, dtypes, devices or options; on CPU also for a non-finite logit_scale (on a GPU
    the check would wait for the device; the loss is then not finite).
    """
    scale, image_ids, text_ids = _check(
        image_features,
        text_features,
        logit_scale,
        image_ids,
        text_ids,
        positives,
        bias,
        sides,
        grouped=group is not None,
    )
    mode = "share" if positives in ("soft", "supcon") else positives
    columns = sides == "both"
    if not columns:
        text_features = text_features.detach()
    if group is not None and dist.get_world_size(group) > 1:
        return group_share(image_features, text_features, scale, bias, image_ids, text_ids, mode, columns, group)
    ids = None if image_ids is None or text_ids is None else (image_ids, image_ids, text_ids)
    row_weight, col_weight = positive_weights(image_features, text_features, ids, 0, mode, columns)
    row_lse, col_lse, target = logit_statistics(
        image_features, text_features, scale, bias, image_ids, text_ids, row_weight, col_weight, 0, mode, columns
    )
    # Subtract before summing: the terms are small differences of large numbers.
    return (row_lse + col_lse - target).mean() / 2 if columns else (row_lse - target).mean()


def _check(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    positives: str,
    bias: Tensor | None,
    sides: str,
    grouped: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Validate the arguments of `contrastive_loss`; return the scale as a tensor and both ids as int64."""
    if positives not in ("diagonal", "soft", "mask", "supcon"):
        raise ValueError(f"positives={positives!r} is not one of 'diagonal', 'soft', 'mask', 'supcon'")
    if sides not in ("both", "rows"):
        raise ValueError(f"sides={sides!r} is not one of 'both', 'rows'")
    shapes = f"image_features {tuple(image.shape)} and text_features {tuple(text.shape)}"
    if image.ndim != 2 or text.ndim != 2 or image.shape[1] != text.shape[1] or not image.shape[1]:
        raise ValueError(f"{shapes} must be (B, D) with the same D >= 1")
    if image.dtype != text.dtype or not image.is_floating_point():
        raise ValueError(f"image_features ({image.dtype}) and text_features ({text.dtype}) must share a floating dtype")
    if image.shape[0] != text.shape[0] and (sides == "both" or text.shape[0] < image.shape[0]):
        raise ValueError(f"{shapes} must have equally many rows (with sides='rows', texts at least as many as images)")
    if not image.shape[0] and not grouped:
        raise ValueError(f"{shapes} hold no pair; pass at least one")
    scale = torch.as_tensor(logit_scale, dtype=None if isinstance(logit_scale, Tensor) else torch.float32)
    if not isinstance(logit_scale, Tensor):
        scale = scale.to(device=image.device, dtype=accumulate_dtype(image.dtype))
    if scale.numel() != 1 or not scale.is_floating_point():
        raise ValueError(f"logit_scale of shape {tuple(scale.shape)} and {scale.dtype} must be one floating number")
    if bias is not None and (bias.shape != text.shape[:1] or not bias.is_floating_point()):
        raise ValueError(f"bias {tuple(bias.shape)} of {bias.dtype} must be ({text.shape[0]},) floats, one per text")
    if positives == "diagonal":
        if image_ids is not None or text_ids is not None:
            raise ValueError(
                "positives='diagonal' does not use ids; leave them out or choose 'soft', 'mask' or 'supcon'"
            )
    elif image_ids is None:
        raise ValueError(f"positives={positives!r} compares ids; pass image_ids")
    elif text_ids is None:
        text_ids = image_ids
    for name, ids, rows in (("image_ids", image_ids, image.shape[0]), ("text_ids", text_ids, text.shape[0])):
        if ids is not None and (ids.shape != (rows,) or ids.is_floating_point() or ids.dtype == torch.bool):
            raise ValueError(f"{name} {tuple(ids.shape)} of {ids.dtype} must be ({rows},) integers")
    devices = {t.device for t in (image, text, scale, bias, image_ids, text_ids) if t is not None}
    if len(devices) > 1:
        raise ValueError(f"arguments lie on {sorted(map(str, devices))}; move them to one device")
    return scale, None if image_ids is None else image_ids.long(), None if text_ids is None else text_ids.long()
