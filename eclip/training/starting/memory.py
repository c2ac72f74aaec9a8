"""What a run needs of memory and disk, from its settings: formulas with measured constants.

Saved activations of a transformer block are proportional to tokens x width. The constants of float32 are sums over the
tensors that autograd saves (saved_tensors_hooks, torch 2.13 on a CPU: `demo`, `demo_towers` and `vit_b16` agree to 3%;
tests/training/starting/test_memory.py measures two again). Those of bfloat16 autocast are a GPU's: 63.3 MB an image,
325 KB a text token, 5 MB a row of the decoder of `vit_b16`, with a float32 residual stream.

Letters: n tokens, W width, T queries, N patch tokens, D embed_dim.
"""

import math
from dataclasses import dataclass

import torch

from eclip.config import RunConfig
from eclip.dataloading.loader import choose_decoder
from eclip.dataloading.needs import loader_needs
from eclip.dataloading.parts import Parts
from eclip.model.eclip import ECLIP
from eclip.objectives.objective import make_objective
from eclip.training.optim import lock_towers

_HOST = 0.1e9  # threads, libraries, the allocator's slack: 0.09 to 0.12 in runs of `demo` and `demo_towers`' shapes
_CUDA = 1.0e9  # context, cuBLAS workspaces
_KEPT_LOGITS = 2 << 30  # the contrastive loss keeps up to so much of its logits on a GPU (keep_bytes)


@dataclass(frozen=True)
class _Bytes:
    """Saved for the backward pass, bytes for each token, layer and unit of width."""

    image: float
    text: float
    decoder: float
    """For each query; the tokens are extra."""
    value: int
    """Of an activation."""
    residual: int
    transient: float
    """Of one block while it is computed, without gradient."""


_FLOAT32 = _Bytes(image=65, text=81, decoder=89, value=4, residual=4, transient=40)
_BFLOAT16 = _Bytes(image=35, text=35, decoder=41, value=2, residual=4, transient=22)
_LAYER_SCALE = 2  # saved values for each token and unit of width: what each of two branches is before its scale


def parameters(config: RunConfig) -> tuple[int, int]:
    """How many the model has, and how many of them train. Nothing is allocated."""
    with torch.device("meta"):
        model = ECLIP(config.model)
    lock_towers(model, config)
    make_objective(config.objective).lock_unused(model)
    return sum(p.numel() for p in model.parameters()), sum(p.numel() for p in model.parameters() if p.requires_grad)


def state_bytes(config: RunConfig, shards: int) -> float:
    """Parameters, momentum model, gradients and two moments of the optimizer, float32, over `shards` devices.

    What is locked has neither of the last two, and the momentum model shares it.
    """
    every, trained = parameters(config)
    copies = (1 if make_objective(config.objective).needs_momentum else 0) + 1 + 2
    return 4 * (every + copies * trained) / shards


def row_bytes(config: RunConfig, tokens: float, *, bf16: bool) -> float:
    """What each product of a (micro-)batch adds: saved activations of all that trains, and view b.

    tokens: of a title, on average.
    """
    model, size = config.model, _sizes(config, bf16)
    decoded = max(1, round(config.objective.token_keep * model.grid**2))
    patches = 1 + decoded
    total = 0.0
    if not config.cache_features:
        per_block = size.image + (_LAYER_SCALE * size.value if model.layer_scale else 0)
        depth = _trained_depth(config.lock_image, config.unlock_last, model.vision_depth)
        total += patches * model.vision_width * _saved(config, per_block, size, depth)
        total += patches * model.vision_width * size.transient  # view b, or a locked tower: a block at a time
        total += 3 * model.image_size**2 * (4 + size.value)  # normalised pixels
    if not (config.cache_features and config.lock_text):
        depth = _trained_depth(config.lock_text, config.unlock_last, model.text_depth)
        total += tokens * model.text_width * _saved(config, size.text, size, depth)
    total += 2 * patches * (model.vision_width * 4 + model.embed_dim * (size.value + 4))  # towers' outputs, g_I
    if config.objective.objective != "clip":
        total += model.num_queries * model.embed_dim * size.decoder * model.decoder_depth
        total += 2 * decoded * model.embed_dim * 4  # the tokens, and their gradient for all blocks together
    return total


def step_bytes(config: RunConfig, tokens: float, *, world_size: int, shards: int, bf16: bool, cuda: bool) -> float:
    """A rank's peak in a step, on the device that computes it: states, activations of a part, what is kept of all."""
    model, size = config.model, _sizes(config, bf16)
    parts = Parts(config.schedule, 0, world_size, config.micro_batch)
    share = config.schedule.largest // world_size
    kept = share * 2 * 3 * model.image_size**2 if not config.cache_features else 0
    if config.micro_batch is not None and parts.most_rows < share:
        kept += share * (1 + model.grid**2) * model.embed_dim * size.value  # view b's tokens
    logits = min(_KEPT_LOGITS, 4 * share * config.schedule.largest) if cuda else 0
    return (
        state_bytes(config, shards)
        + parts.most_rows * row_bytes(config, tokens, bf16=bf16)
        + kept
        + logits
        + (_CUDA if cuda else _HOST)
    )


def loader_bytes(config: RunConfig, world_size: int, *, on_gpu: bool = False) -> float:
    """Host memory of a rank's loader: dataloading/needs.py, where it is measured."""
    decoder = "none" if config.cache_features else choose_decoder(config.data.decoder)
    rows = Parts(config.schedule, 0, world_size, config.micro_batch).most_rows
    return loader_needs(rows, config.model.image_size, config.data.num_workers, decoder, on_gpu=on_gpu).host_bytes


def cache_shape(config: RunConfig, images: int) -> tuple[int, ...]:
    """Of the feature cache's array of float16: (images, views, 1+N, W)."""
    return (images, config.cached_views, 1 + config.model.grid**2, config.model.vision_width)


def cache_bytes(config: RunConfig, images: int) -> int:
    """Disk that the image features of a split take: 109 KiB an image and view of `demo_towers`."""
    return 2 * math.prod(cache_shape(config, images))


def _sizes(config: RunConfig, bf16: bool) -> _Bytes:
    if not bf16:
        return _FLOAT32
    if config.compute.residual == "fp32":
        return _BFLOAT16
    # Two residual adds and the inputs of two norms are halved.
    smaller = {"image": _BFLOAT16.image - 4, "text": _BFLOAT16.text - 4, "decoder": _BFLOAT16.decoder - 4}
    return _Bytes(**smaller, value=2, residual=2, transient=_BFLOAT16.transient)


def _trained_depth(locked: bool, unlock_last: int, depth: int) -> int:
    return min(unlock_last, depth) if locked else depth


def _saved(config: RunConfig, per_block: float, size: _Bytes, depth: int) -> float:
    """Bytes for each token and unit of width of `depth` blocks that train."""
    match config.compute.activation_checkpointing:
        case "none":
            return depth * per_block
        case "blocks":  # the block's input, and one block as a whole
            return depth * size.residual + (per_block if depth else 0)
        case "selective":  # q, k, v and four matrix products' outputs: 3 + 1 + 4 + 1 widths, and the input
            return depth * (9 * size.value + size.residual) + (per_block if depth else 0)
