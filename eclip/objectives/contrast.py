"""The contrastive losses of an objective, and the seam to the kernels that compute them.

    L_itc    symmetric InfoNCE between g_I(v_cls) and g_T(w_cls), with e-CLIP's soft labels (arXiv 2207.00208)
    L_inter  InfoNCE between the positive query's output on image a and the momentum model's on image b of the product

Both take unit vectors (`unit`) of some rows and compare them with those of the whole global batch. Each is these rows'
share; the mean over ranks (and, of L_inter, over micro-batches) is exact.

Letters: B products of this rank or micro-batch, G of the global batch, D embedding width.
"""

from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from eclip.kernels.contrastive import contrastive_loss, contrastive_loss_reference
from eclip.kernels.launch import accumulate_dtype, autocast_off
from eclip.objectives.settings import ObjectiveConfig


class Labels(Protocol):
    """What says which rows are alike: a Batch, or the ids of several."""

    @property
    def title_ids(self) -> Tensor:
        """(B, 2) int64."""

    @property
    def catalog_ids(self) -> Tensor:
        """(B,) int64."""


def unit(x: Tensor) -> Tensor:
    """x / |x| along the last dimension: float64 stays that, all else becomes float32, autocast or not.

    A cosine's rounding to bfloat16 (2^-9) is 0.02 of a logit at the temperatures near 0.1 that divide it.
    """
    with autocast_off(x):
        return F.normalize(x.to(accumulate_dtype(x.dtype)), dim=-1)


def image_text_loss(
    images: Tensor,
    texts: Tensor,
    batch: Labels,
    config: ObjectiveConfig,
    *,
    scale: Tensor,
    kernels: str,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """L_itc of unit images and texts (B, D) of this rank against all ranks'; `batch` says which rows share a label."""
    titles = batch.title_ids[:, 0].contiguous()
    ids = {"none": None, "title": titles, "catalog": batch.catalog_ids}[config.soft_labels]
    positives = "diagonal" if ids is None else "soft"
    return contrast(images, texts, scale, kernels, group, image_ids=ids, text_ids=ids, positives=positives)


def inter_product_loss(
    instances: Tensor, keys: Tensor, products: Tensor, temperature: float, *, first: int, kernels: str
) -> Tensor:
    """L_inter of unit instances (B, D), rows first ... first+B-1 of the G of the momentum model's unit keys (G, D).

    products: (G,) ids; other rows of a row's product are no negatives. The keys are fixed, so that rows do not couple:
    the mean over any parts of a batch is that of the batch.
    """
    scale = torch.full((), 1 / temperature, dtype=instances.dtype, device=instances.device)
    keys, ids = keys.roll(-first, 0), products.roll(-first, 0)  # row i is paired with key i
    own = ids[: len(instances)]
    return contrast(instances, keys, scale, kernels, None, image_ids=own, text_ids=ids, positives="mask", sides="rows")


def contrast(
    images: Tensor, texts: Tensor, scale: Tensor, kernels: str, group: dist.ProcessGroup | None, **options: Any
) -> Tensor:
    """The contrastive loss of this rank's unit rows (B, D) against those of `group`; kernels: as the model has it.

    The kernels take autocast's dtype for the operands of their products: fp32 ones have no tensor cores. What matters,
    the sums and the pairs' own logits, is float32 inside. Raises ValueError for the reference on several ranks.
    """
    world_size = 1 if group is None else dist.get_world_size(group)
    if kernels != "reference":
        # The sampler gives every rank as many products, so counts need not be exchanged, nor the GPU be waited for.
        rows_per_rank = None if group is None else (len(images),) * world_size
        return contrastive_loss(images, texts, scale, group=group, rows_per_rank=rows_per_rank, **options)
    if world_size > 1:
        raise ValueError("--kernels reference compares on one rank; start without torchrun, or use --kernels auto")
    return contrastive_loss_reference(images, texts, scale, **options)
