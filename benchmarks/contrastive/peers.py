"""The contrastive loss of published packages, each as loss(image, text, scale): the mean over both directions.

A package is imported when its adapter is asked for and not before, so that a machine without it runs the rest.
Signatures are those of the versions named in providers.py. Features (B, D) are normalised.
"""

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

Loss = Callable[[Tensor, Tensor, Any], Tensor]


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


def open_clip() -> Loss:
    clip_loss = open_clip_losses().ClipLoss()

    def loss(image: Tensor, text: Tensor, scale: Any) -> Tensor:
        half = image.dtype in (torch.bfloat16, torch.float16)
        with torch.autocast(image.device.type, image.dtype if half else torch.bfloat16, enabled=half):
            result: Tensor = clip_loss(image, text, scale)
        return result

    return loss


def memeff() -> Loss:
    package = importlib.import_module("memeff")

    def loss(image: Tensor, text: Tensor, scale: Any) -> Tensor:
        module = package.MemoryEfficientCLIPLoss(temperature=1 / scale, normalized_inputs=True, stable=False)
        result: Tensor = module(image, text)
        return result

    return loss


def inf_cl() -> Loss:
    # Not cal_inf_loss: outside a process group, the gradient of its scale fails in an all-reduce.
    cal_flash_loss = importlib.import_module("inf_cl").cal_flash_loss
    return _both_ways(lambda queries, keys, scale, labels: cal_flash_loss(queries, keys, labels, scale).mean())


def cut_cross_entropy() -> Loss:
    linear_cross_entropy = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    return _both_ways(
        lambda queries, keys, scale, labels: linear_cross_entropy(scale * queries, keys, labels, filter_eps=None)
    )


def liger() -> Loss:
    functional = importlib.import_module("liger_kernel.transformers.functional")
    fused = functional.liger_fused_linear_cross_entropy
    return _both_ways(
        lambda queries, keys, scale, labels: fused(scale * queries, keys, labels, accum_dtype=torch.float32)
    )


def quack() -> Loss:
    chunked = importlib.import_module("quack.linear_cross_entropy").chunked_linear_cross_entropy
    return _both_ways(lambda queries, keys, scale, labels: chunked(scale * queries, keys, labels))


def _both_ways(one_way: Callable[[Tensor, Tensor, Any, Tensor], Tensor]) -> Loss:
    """The mean of image-to-text and text-to-image."""

    def loss(image: Tensor, text: Tensor, scale: Any) -> Tensor:
        labels = torch.arange(len(image), device=image.device)
        return (one_way(image, text, scale, labels) + one_way(text, image, scale, labels)) / 2

    return loss
