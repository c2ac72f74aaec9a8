"""Who else computes the contrastive loss: plain PyTorch, and published packages where they are installed.

Each provider is a `Provider` of PROVIDERS: `load()` imports what it needs and returns loss(image, text, scale) with the
mean over both directions, for normalised features (B, D). Packages are imported there alone, so that a machine without
them runs the rest; signatures are those of the versions named in the remarks.

Plain PyTorch computes logits in the features' dtype and softmaxes in float32, as training under autocast does:
`contrastive_loss_reference` is float32 throughout, and a bf16 kernel that beats it has beaten the dtype.

Letters: B pairs, D features.
"""

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.contrastive.blocks import blocks
from benchmarks.harness.providers import compiled
from eclip.kernels.contrastive import contrastive_loss, contrastive_loss_reference

Loss = Callable[[Tensor, Tensor, Any], Tensor]


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


# --- Plain PyTorch ----------------------------------------------------------------------------------------------------


def _logits(image: Tensor, text: Tensor, scale: Any) -> Tensor:
    logits: Tensor = scale * image @ text.T
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def eager(image: Tensor, text: Tensor, scale: Any) -> Tensor:
    logits = _logits(image, text, scale)
    labels = torch.arange(len(image), device=image.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def eager_soft(image: Tensor, text: Tensor, scale: Any, ids: Tensor) -> Tensor:
    """e-CLIP's label matrix: pairs of equal ids share a row's target mass."""
    logits = _logits(image, text, scale)
    same = (ids[:, None] == ids).to(logits.dtype)
    target = same / same.sum(1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def eager_fixed_keys(image: Tensor, text: Tensor, scale: Any, ids: Tensor) -> Tensor:
    """Images against fixed keys; other pairs of the same product count nowhere."""
    logits = _logits(image, text.detach(), scale)
    other = (ids[:, None] == ids).fill_diagonal_(False)
    return F.cross_entropy(logits.masked_fill(other, -torch.inf), torch.arange(len(image), device=image.device))


# --- Packages ---------------------------------------------------------------------------------------------------------


def open_clip_losses() -> ModuleType:
    """open_clip's loss.py, without its package: that wants torchvision, timm and more at import.

    Raises ModuleNotFoundError where open_clip is not installed.
    """
    spec = importlib.util.find_spec("open_clip")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("open_clip_torch is not installed")
    path = Path(spec.submodule_search_locations[0]) / "loss.py"
    file = importlib.util.spec_from_file_location("open_clip_loss", path)
    assert file is not None and file.loader is not None
    module = importlib.util.module_from_spec(file)
    file.loader.exec_module(module)
    return module


def _open_clip() -> Loss:
    clip_loss = open_clip_losses().ClipLoss()

    def loss(image: Tensor, text: Tensor, scale: Any) -> Tensor:
        half = image.dtype in (torch.bfloat16, torch.float16)
        with torch.autocast(image.device.type, image.dtype if half else torch.bfloat16, enabled=half):
            result: Tensor = clip_loss(image, text, scale)
        return result

    return loss


def _memeff() -> Loss:
    memeff = importlib.import_module("memeff")

    def loss(image: Tensor, text: Tensor, scale: Any) -> Tensor:
        module = memeff.MemoryEfficientCLIPLoss(temperature=1 / scale, normalized_inputs=True, stable=False)
        result: Tensor = module(image, text)
        return result

    return loss


def _inf_cl() -> Loss:
    # Not cal_inf_loss: outside a process group, the gradient of its scale fails in an all-reduce.
    cal_flash_loss = importlib.import_module("inf_cl").cal_flash_loss
    return _both_ways(lambda queries, keys, scale, labels: cal_flash_loss(queries, keys, labels, scale).mean())


def _cut_cross_entropy() -> Loss:
    linear_cross_entropy = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    return _both_ways(
        lambda queries, keys, scale, labels: linear_cross_entropy(scale * queries, keys, labels, filter_eps=None)
    )


def _liger() -> Loss:
    functional = importlib.import_module("liger_kernel.transformers.functional")
    fused = functional.liger_fused_linear_cross_entropy
    return _both_ways(
        lambda queries, keys, scale, labels: fused(scale * queries, keys, labels, accum_dtype=torch.float32)
    )


def _quack() -> Loss:
    chunked = importlib.import_module("quack.linear_cross_entropy").chunked_linear_cross_entropy
    return _both_ways(lambda queries, keys, scale, labels: chunked(scale * queries, keys, labels))


def _both_ways(one_way: Callable[[Tensor, Tensor, Any, Tensor], Tensor]) -> Loss:
    """The mean of image-to-text and text-to-image."""

    def loss(image: Tensor, text: Tensor, scale: Any) -> Tensor:
        labels = torch.arange(len(image), device=image.device)
        return (one_way(image, text, scale, labels) + one_way(text, image, scale, labels)) / 2

    return loss


PROVIDERS = {
    "ours": Provider(lambda: contrastive_loss),
    "eager": Provider(lambda: eager, "B x B logits", bytes_per_logit=16),
    "compile": Provider(lambda: compiled(eager), "torch.compile of eager", bytes_per_logit=16),
    "reference": Provider(lambda: contrastive_loss_reference, "float32 inside, B x B logits", bytes_per_logit=32),
    "cublas blocks": Provider(lambda: blocks, "blocks of logits through memory"),
    "open_clip": Provider(
        _open_clip, "3.3.0: B x B logits, twice; under autocast", "open_clip_torch", "open_clip", bytes_per_logit=16
    ),
    "memeff": Provider(
        _memeff,
        "0.3.1, stable=False: no gradient of the scale",
        "memeff",
        "memeff",
        gpu_only=True,
        scale_gradient=False,
    ),
    "inf-cl": Provider(
        _inf_cl,
        "1.2.1: one-sided, run twice; float32 copies, TF32 products; D a multiple of 256",
        "inf-cl",
        "inf_cl",
        gpu_only=True,
    ),
    "cut-cross-entropy": Provider(
        _cut_cross_entropy,
        "25.1.1, filter_eps=None: one-sided, run twice",
        "cut-cross-entropy",
        "cut_cross_entropy",
        gpu_only=True,
        syncs=True,  # .nonzero()
    ),
    "liger": Provider(
        _liger,
        "0.8.5, accum_dtype=float32: one-sided, run twice; logits through memory by chunks",
        "liger-kernel",
        "liger_kernel",
        gpu_only=True,
        syncs=True,  # .item()
    ),
    "quack": Provider(
        _quack, "0.6.5: one-sided, run twice; B a multiple of 8", "quack-kernels", "quack", gpu_only=True
    ),
}
