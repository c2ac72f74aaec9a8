"""Parameter groups: which parameters decay, and which learn slower."""

import re
from typing import Any

from torch import nn

from eclip.config import OptimConfig

# Weight decay pulls towards zero. Biases, norms and the temperature (all of them vectors) have no reason to go there,
# nor have the rows that tell positions, types and the CLS token apart, or the query of attention pooling.
_UNDECAYED = re.compile(r"(pos_embed|cls_token|latent|position|modality|type)")
_TOWER = re.compile(r"(image_encoder|text_encoder)\.(?:blocks\.(\d+)\.)?")
# Behind the blocks of its tower; BERT's norm stands before them.
_ABOVE = ("image_encoder.norm.", "image_encoder.attn_pool.", "text_encoder.final_norm.", "text_encoder.head.")


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: matrices and convolutions only, and no position or type embedding."""
    return parameter.ndim >= 2 and not _UNDECAYED.search(name)


def is_block_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether it is a matrix of a transformer block, of a tower's or the decoder's."""
    return parameter.ndim == 2 and ".blocks." in name


def lr_scales(model: nn.Module, config: OptimConfig) -> dict[str, float]:
    """Factor on the learning rate of every parameter, by name.

    Towers take `tower_learning_rate_scale` times `layer_decay` to the power of how many layers lie above, as BEiT and
    MAE count: 0 above a tower's final norm, 1 above its last block, 2 above the one below, depth + 1 above embeddings.
    """
    depths = dict.fromkeys(("image_encoder", "text_encoder"), 0)
    for name, _ in model.named_parameters():
        if (found := _TOWER.match(name)) and found[2]:
            depths[found[1]] = max(depths[found[1]], int(found[2]) + 1)
    scales = {}
    for name, _ in model.named_parameters():
        scales[name] = 1.0
        if found := _TOWER.match(name):
            layer = depths[found[1]] + 1 if name.startswith(_ABOVE) else int(found[2]) + 1 if found[2] else 0
            above = depths[found[1]] + 1 - layer
            scales[name] = config.tower_learning_rate_scale * config.layer_decay**above
    return scales


def param_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Trainable parameters in groups of one learning rate and one weight decay, and for Muon of one rule.

    Each group carries `lr_scale`, the factor that `set_learning_rate` applies, and `muon`, whether Muon moves it.
    Locked parameters (requires_grad=False) are in none. Raises ValueError when nothing is left to train.
    """
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    scales = lr_scales(model, config)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            weight_decay = config.weight_decay if decays(name, parameter) else 0.0
            muon = config.optimizer == "muon" and is_block_matrix(name, parameter)
            groups.setdefault((scales[name], weight_decay, muon), []).append(parameter)
    if not groups:
        raise ValueError("every parameter is locked; drop --lock-image or --lock-text")
    return [
        {"params": params, "lr_scale": lr_scale, "weight_decay": weight_decay, "muon": muon}
        for (lr_scale, weight_decay, muon), params in groups.items()
    ]
