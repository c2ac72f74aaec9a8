"""Calls of the contrastive losses' launchers whose kernels are compiled: each loss, with ids, frozen towers, ranks."""

from dataclasses import dataclass

import torch

from ..contrastive.options import padded_shape
from ..contrastive.problem import Logits, Wanted, find_matches, positive_weights
from ..contrastive.triton_backward import triton_gradients
from ..contrastive.triton_forward import triton_statistics


@dataclass(frozen=True, kw_only=True)
class ContrastiveCall:
    """Forward and backward of one loss. Its second passes, which seldom run, are launched beside the first."""

    images: int = 32768
    texts: int = 32768
    """As many with sides="both" and positives="all", else at least; the images are paired with the last of them."""
    dim: int = 512
    dtype: str = "bfloat16"
    sides: str = "both"
    positives: str = "diagonal"
    bias: bool = False
    kept: bool = False
    """exp(logits) is kept for the backward: bfloat16, not "sigmoid"."""
    frozen_images: bool = False
    frozen_texts: bool = False

    def run(self) -> None:
        """Call the launchers, with tensors on the default device."""
        dtype = getattr(torch, self.dtype)
        image, text = (torch.empty(n, self.dim, dtype=dtype) for n in (self.images, self.texts))
        offset = self.texts - self.images
        matches = None
        if self.positives != "diagonal":
            image_ids, text_ids = (torch.empty(n, dtype=torch.int64) for n in (self.images, self.texts))
            matches = find_matches(image_ids, text_ids, self.positives)
        row_weight, col_weight = positive_weights(image, self.texts, matches, offset, self.sides, self.positives)
        logits = Logits(
            image=image,
            text=text,
            scale=torch.empty(1),
            bias=torch.empty(self.texts) if self.bias else None,
            row_match=None if matches is None else matches.rows,
            col_match=None if matches is None else matches.cols,
            row_weight=row_weight,
            col_weight=col_weight,
            shift=torch.empty(1),
            offset=offset,
            sides=self.sides,
            positives=self.positives,
        )
        kept = torch.empty(padded_shape(self.images, self.texts), dtype=torch.bfloat16) if self.kept else None
        row_stat, col_stat, _ = triton_statistics(logits, kept)
        wanted = Wanted(image=not self.frozen_images, text=not self.frozen_texts, scale=True, bias=self.bias)
        triton_gradients(logits, row_stat, col_stat, kept, torch.empty(()), wanted)


CONTRASTIVE_CALLS = (
    # L_itc: as in training, its logits kept or not; with ids; of one rank; the demo's size.
    ContrastiveCall(kept=True),
    ContrastiveCall(),
    ContrastiveCall(positives="all"),
    ContrastiveCall(positives="all", kept=True),
    ContrastiveCall(positives="mask"),
    ContrastiveCall(images=128, texts=896),
    ContrastiveCall(images=300, texts=300, dim=768, positives="all"),
    ContrastiveCall(dim=1024, positives="all", bias=True),
    ContrastiveCall(dim=64),
    # Frozen towers.
    ContrastiveCall(frozen_images=True),
    ContrastiveCall(frozen_texts=True),
    ContrastiveCall(dim=1024, positives="all", bias=True, frozen_images=True),
    ContrastiveCall(sides="sigmoid", dim=64, positives="all", bias=True, frozen_images=True),
    # L_inter, and images against fixed keys.
    ContrastiveCall(sides="rows", positives="mask", kept=True, frozen_texts=True),
    ContrastiveCall(sides="rows", positives="mask", frozen_texts=True),
    ContrastiveCall(sides="rows", positives="mask", bias=True, frozen_texts=True),
    ContrastiveCall(sides="rows", kept=True, texts=65536, frozen_texts=True),
    # Biases.
    ContrastiveCall(positives="mask", bias=True),
    ContrastiveCall(positives="mask", bias=True, kept=True),
    # SigLIP's.
    ContrastiveCall(sides="sigmoid", bias=True),
    ContrastiveCall(sides="sigmoid", positives="mask", bias=True),
    ContrastiveCall(sides="sigmoid", dim=64, positives="all", bias=True),
    # Other dtypes.
    ContrastiveCall(dtype="float16"),
    ContrastiveCall(images=2048, texts=2048, dtype="float32", positives="mask", bias=True),
    ContrastiveCall(images=2048, texts=2048, dtype="float32", sides="sigmoid", bias=True),
    ContrastiveCall(images=2048, texts=2048, dtype="float32", dim=768, sides="rows", positives="all"),
    ContrastiveCall(
        images=2048, texts=2048, dtype="float32", dim=768, sides="rows", positives="all", frozen_images=True
    ),
)
