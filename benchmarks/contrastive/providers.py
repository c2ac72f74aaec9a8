"""Whom the benchmark of the contrastive loss compares: our op, plain PyTorch, published packages where installed.

Each is a `Provider` of PROVIDERS: `load()` imports what it needs and returns loss(image, text, scale) with the mean
over both directions, for normalised features (B, D).
"""

import importlib.metadata
import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch

from benchmarks.contrastive import peers
from benchmarks.contrastive.baselines import eager
from benchmarks.contrastive.blocks import blocks
from benchmarks.contrastive.peers import Loss
from benchmarks.harness.providers import compiled
from eclip.kernels.contrastive import contrastive_loss, contrastive_loss_reference


class Provider(NamedTuple):
    """One implementation: how to get it, and what it cannot do."""

    load: Callable[[], Loss]
    remark: str = ""
    package: str | None = None
    """The distribution that it comes from; None: nothing but PyTorch."""
    module: str = ""
    """What `package` is imported as."""
    gpu_only: bool = False
    syncs: bool = False
    """Makes the host wait for the GPU: no CUDA graph can hold it, and a capture that fails spoils later ones."""
    scale_gradient: bool = True
    """False: the scale is a Python number to it."""
    bytes_per_logit: int = 0
    """At the peak of forward and backward, as PyTorch's CPU allocator counts them in bf16; 0: memory is linear in B."""

    def missing(self) -> str | None:
        """Why this provider cannot run here; None if it can."""
        if self.module and importlib.util.find_spec(self.module) is None:
            return f"{self.package} is not installed"
        if self.gpu_only and not torch.cuda.is_available():
            return f"{self.package} needs a GPU"
        return None

    def version(self) -> str | None:
        """Of the package; None where it is on the path without a record of what it is, or there is none."""
        try:
            return importlib.metadata.version(self.package) if self.package else None
        except importlib.metadata.PackageNotFoundError:
            return None


PROVIDERS = {
    "ours": Provider(lambda: contrastive_loss),
    "eager": Provider(lambda: eager, "B x B logits", bytes_per_logit=16),
    "compile": Provider(lambda: compiled(eager), "torch.compile of eager", bytes_per_logit=16),
    "reference": Provider(lambda: contrastive_loss_reference, "float32 inside, B x B logits", bytes_per_logit=32),
    "cublas blocks": Provider(lambda: blocks, "blocks of logits through memory"),
    "open_clip": Provider(
        peers.open_clip,
        "3.3.0: B x B logits, twice; under autocast",
        "open_clip_torch",
        "open_clip",
        bytes_per_logit=16,
    ),
    "memeff": Provider(
        peers.memeff,
        "0.3.1, stable=False: no gradient of the scale",
        "memeff",
        "memeff",
        gpu_only=True,
        scale_gradient=False,
    ),
    "inf-cl": Provider(
        peers.inf_cl,
        "1.2.1: one-sided, run twice; float32 copies, TF32 products; D a multiple of 256",
        "inf-cl",
        "inf_cl",
        gpu_only=True,
    ),
    "cut-cross-entropy": Provider(
        peers.cut_cross_entropy,
        "25.1.1, filter_eps=None: one-sided, run twice",
        "cut-cross-entropy",
        "cut_cross_entropy",
        gpu_only=True,
        syncs=True,  # .nonzero()
    ),
    "liger": Provider(
        peers.liger,
        "0.8.5, accum_dtype=float32: one-sided, run twice; logits through memory by chunks",
        "liger-kernel",
        "liger_kernel",
        gpu_only=True,
        syncs=True,  # .item()
    ),
    "quack": Provider(
        peers.quack, "0.6.5: one-sided, run twice; B a multiple of 8", "quack-kernels", "quack", gpu_only=True
    ),
}
