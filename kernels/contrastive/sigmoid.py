"""Sigmoid loss of SigLIP over all pairs of a batch in memory linear in the batch, exact over any number of ranks.

    s_ij = scale <I_i, T_j> + b      loss = -1/B sum_ij log sigmoid(z_ij s_ij) = 1/B sum_ij (softplus(s_ij) - m_ij s_ij)

z_ij = 1 at the positives (m_ij = 1: the pair itself, or every pair of equal ids) and -1 elsewhere. Every pair is a
classification of its own: there is no softmax, so no sums to share between ranks. Tiles, traffic and the exchange of
one tower are those of loss.py.

Source: SigLIP (arXiv 2303.15343), which starts from scale 10 and b = -10.

Letters: B pairs (of all ranks), D features.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
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

Positives = Literal["diagonal", "all", "mask"]


def sigmoid_loss_reference(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    *,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    positives: Positives = "diagonal",
) -> Tensor:
    """The specification of `sigmoid_loss`, without a process group: builds the whole matrix of logits.

    Shapes, meanings and errors as there. Computes in fp32, or in fp64 if the features are fp64, under autocast too.
    """
    scale, bias, image_ids, text_ids = _check(
        image_features, text_features, logit_scale, logit_bias, image_ids, text_ids, positives
    )
    compute = accumulate_dtype(image_features.dtype)
    with autocast_off(image_features):
        logits = image_features.to(compute) @ text_features.to(compute).T
        logits = scale.to(compute).reshape(()) * logits + bias.to(compute).reshape(())
        positive = torch.eye(*logits.shape, dtype=torch.bool, device=logits.device)
        counted = torch.ones_like(positive)
        if image_ids is not None and text_ids is not None:
            same = image_ids[:, None] == text_ids[None, :]
            if positives == "mask":
                counted = positive | ~same
            else:
                positive = positive | same
        log_p = F.logsigmoid(torch.where(positive, logits, -logits))
        return -log_p.masked_fill(~counted, 0.0).sum() / logits.shape[0]


def sigmoid_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    *,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    positives: Positives = "diagonal",
    group: dist.ProcessGroup | None = None,
    rows_per_rank: Sequence[int] | None = None,
) -> Tensor:
    """SigLIP's loss of a batch of pairs in memory linear in the batch; a scalar in fp32 (fp64 for fp64 features).

    image_features, text_features: (B, D), one floating dtype, used as given (normalise before). Pair i is image i with
        text i. Under autocast they are taken in its dtype, as operands of a matmul are; everything after is fp32.
    logit_scale, logit_bias: one element each; differentiable if tensors.
    image_ids, text_ids: (B,) integers naming the product or catalogue entry of a row; text_ids defaults to image_ids.
    positives: what equal ids mean.
        "diagonal": no ids; row i's positive is column i.
        "all": every pair of equal ids is a positive, beside the pair itself.
        "mask": equal ids off the pair count nowhere.
    group, rows_per_rank: as in `contrastive_loss`; the loss is the sum over all ranks' pairs divided by their number.

    Raises ValueError for wrong shapes, dtypes, devices or options; on CPU also for a non-finite logit_scale (on a GPU
    the check of a tensor would wait for the device; the loss is then not finite).
    """
    scale, bias, image_ids, text_ids = _check(
        image_features, text_features, logit_scale, logit_bias, image_ids, text_ids, positives, group
    )
    check_rows_per_rank(rows_per_rank, image_features, text_features, group)
    image, text = (x.to(autocast_dtype(x)) for x in (image_features, text_features))
    # A bias a column is what the op takes. Its gradients, B numbers, are summed before they are rounded to the bias's
    # own dtype.
    columns = bias.to(accumulate_dtype(image.dtype)).reshape(()).expand(text.shape[0])
    pairs = (image, text, scale, columns, image_ids, text_ids, "sigmoid", positives)
    if group is not None and num_ranks(group) > 1:
        return rank_share(*pairs, group, rows_per_rank)
    return pair_loss(*pairs)


def _check(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    positives: str,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return scale and bias as tensors and both ids as int64."""
    check_option("positives", positives, get_args(Positives))
    scale = as_one_number("logit_scale", logit_scale, image)
    bias = as_one_number("logit_bias", logit_bias, image)
    check_devices(
        image_features=image,
        text_features=text,
        logit_scale=scale,
        logit_bias=bias,
        image_ids=image_ids,
        text_ids=text_ids,
    )
    check_features(image, text, more_texts=False, may_be_empty=num_ranks(group) > 1)
    image_ids, text_ids = check_ids(positives, image_ids, text_ids, image, text)
    return scale, bias, image_ids, text_ids
