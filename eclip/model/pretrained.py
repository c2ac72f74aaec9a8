"""Load a tower's weights from a local safetensors file: a ViT named by timm or Hugging Face, a BERT by the latter.

Each table below maps a parameter of our encoder (timm's names for images) to the names it may have in a file; `#` is
the block's number. Every parameter must be found, with its shape, and every tensor of the file's tower must be used: a
half-loaded tower trains without complaint and is worse than an error. Heads and poolers are left out.

Letters: D width, M and G patches along a side in the file and in the model.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from eclip.model.image_encoder import ImageEncoder
from eclip.model.text_encoder import TextEncoder

Names = Mapping[str, tuple[str, ...]]


def _blocks(prefixes: tuple[str, ...], names: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    return {f"blocks.#.{ours}": tuple(p + n for p in prefixes for n in theirs) for ours, theirs in names.items()}


# The second spelling of each pair is that of the modules in transformers 5, the first that of files on disk.
HUGGING_FACE_VIT: Names = {
    "cls_token": ("embeddings.cls_token",),
    "pos_embed": ("embeddings.position_embeddings",),
    "patch_embed.proj": ("embeddings.patch_embeddings.projection",),
    "norm": ("layernorm",),
    **_blocks(
        ("encoder.layer.#.", "layers.#."),
        {
            "norm1": ("layernorm_before", "norm1"),
            "attn.q": ("attention.attention.query", "attention.q_proj"),
            "attn.k": ("attention.attention.key", "attention.k_proj"),
            "attn.v": ("attention.attention.value", "attention.v_proj"),
            "attn.proj": ("attention.output.dense", "attention.o_proj"),
            "ls1.gamma": ("layer_scale1.lambda1",),
            "norm2": ("layernorm_after", "norm2"),
            "mlp.fc1": ("intermediate.dense", "mlp.fc1"),
            "mlp.fc2": ("output.dense", "mlp.fc2"),
            "ls2.gamma": ("layer_scale2.lambda1",),
        },
    ),
}
HUGGING_FACE_BERT: Names = {
    "word_embedding": ("embeddings.word_embeddings",),
    "position_embedding": ("embeddings.position_embeddings",),
    "norm": ("embeddings.LayerNorm",),
    **_blocks(
        ("encoder.layer.#.",),
        {
            "attn.q": ("attention.self.query",),
            "attn.k": ("attention.self.key",),
            "attn.v": ("attention.self.value",),
            "attn.proj": ("attention.output.dense",),
            "norm1": ("attention.output.LayerNorm",),
            "mlp.fc1": ("intermediate.dense",),
            "mlp.fc2": ("output.dense",),
            "norm2": ("output.LayerNorm",),
        },
    ),
}
TIMM: Names = {}
"""Our own names; also those of a tower saved from this model."""

# Parts of published files that belong to no tower: pretraining and classification heads, constants.
UNUSED = re.compile(r"pooler\.|head|classifier\.|cls\.|(embeddings\.)?mask_token$|embeddings\.position_ids$")


class WeightsFile:
    """One tower's tensors of a file, without their common prefix (`vit.`, `bert.`), counted off as they are read."""

    def __init__(self, path: Path, families: Mapping[str, Names]) -> None:
        """`families`: from a tensor that tells a naming scheme to its table. Raises ValueError when none is there."""
        self.path = path
        try:
            tensors = load_file(path)
        except Exception as error:  # safetensors raises its own SafetensorError, which derives from Exception alone
            raise ValueError(f"{path}: not a readable safetensors file ({error})") from error
        for marker, names in families.items():
            found = [key for key in tensors if key == marker or key.endswith(f".{marker}")]
            if found:
                prefix = found[0].removesuffix(marker)
                self.names = names
                # BERT files converted from TensorFlow call a LayerNorm's weight and bias gamma and beta.
                self.tensors = {
                    re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", key))
                    .removeprefix(prefix): value
                    for key, value in tensors.items()
                    if key.startswith(prefix)
                }  # fmt: skip
                self.unread = set(self.tensors)
                return
        raise ValueError(f"{path}: none of {', '.join(families)} is in this file; it holds no tower of a known kind")

    def take(self, name: str) -> Tensor:
        """The tensor of our parameter `name`. Raises ValueError naming the key the file lacks."""
        generic = re.sub(r"^blocks\.(\d+)\.", "blocks.#.", name)
        number = name.split(".")[1] if generic != name else ""
        stem, _, leaf = generic.rpartition(".")
        if generic in self.names:
            keys = [key.replace("#", number) for key in self.names[generic]]
        elif stem in self.names:
            keys = [f"{key.replace('#', number)}.{leaf}" for key in self.names[stem]]
        elif stem.endswith("attn.qkv") and self.names:
            base = name.removesuffix(f"qkv.{leaf}")
            return torch.cat([self.take(f"{base}{part}.{leaf}") for part in "qkv"])
        else:
            keys = [name]
        for key in keys:
            if key in self.tensors:
                self.unread.discard(key)
                return self.tensors[key]
        raise ValueError(
            f"{self.path}: no {' or '.join(keys)}; the model needs it as {name}: is this file's depth "
            f"and kind (layer_scale: DINOv2 yes, ImageNet ViTs no) that of the configuration?"
        )

    def finish(self) -> None:
        """Raises ValueError when a tensor of the tower was not read."""
        left = sorted(key for key in self.unread if not UNUSED.match(key))
        if left:
            raise ValueError(
                f"{self.path}: {left[0]} (and {len(left) - 1} more) has no place in the configured tower; "
                f"set its depth, and layer_scale for DINOv2, to what the file holds"
            )


def interpolate_positions(positions: Tensor, grid: int) -> Tensor:
    """Resample a position embedding (1, 1+M*M, D), CLS first, to (1, 1+G*G, D), G = `grid`: bicubic, as DINOv2 does.

    Raises ValueError when there are not 1+M*M rows.
    """
    side = round((positions.shape[1] - 1) ** 0.5)
    if positions.ndim != 3 or positions.shape[1] != 1 + side * side:
        raise ValueError(f"a position embedding of shape {tuple(positions.shape)}: expected (1, 1+M*M, D), CLS first")
    if side == grid:
        return positions
    patches = positions[:, 1:].float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :1].float(), patches.flatten(2).transpose(1, 2)], dim=1)


def _fill(module: nn.Module, file: WeightsFile, prepared: Mapping[str, Tensor], advice: str) -> None:
    """Copy each parameter of `module` from `prepared`, else from the file; all are checked before any is written."""
    parameters = dict(module.named_parameters())
    values = {name: prepared[name] if name in prepared else file.take(name) for name in parameters}
    file.finish()
    for name, value in values.items():
        if value.shape != parameters[name].shape:
            raise ValueError(
                f"{file.path}: {name} has shape {tuple(value.shape)}, the configuration asks for "
                f"{tuple(parameters[name].shape)}; {advice}"
            )
    with torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(value)


def load_image_weights(encoder: ImageEncoder, path: Path) -> None:
    """Fill the encoder from a safetensors file of a Hugging Face ViT or DINOv2 or a timm ViT.

    Positions are resampled to the configured grid. Raises ValueError, naming the key, when a tensor is missing, left
    over or of another shape; the encoder is then unchanged.
    """
    file = WeightsFile(
        path,
        {"embeddings.patch_embeddings.projection.weight": HUGGING_FACE_VIT, "patch_embed.proj.weight": TIMM},
    )
    positions = file.take("pos_embed")
    try:
        positions = interpolate_positions(positions, encoder.config.grid)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    _fill(encoder, file, {"pos_embed": positions}, "set vision_width, vision_heads and patch_size to the file's")


def load_text_weights(encoder: TextEncoder, path: Path) -> None:
    """Fill the encoder from a safetensors file of a Hugging Face BERT.

    Position rows beyond max_positions are cut; the token-type row 0, the same for every token, is added to the rest.
    Raises ValueError, naming the key, when a tensor is missing, left over or of another shape.
    """
    file = WeightsFile(path, {"embeddings.word_embeddings.weight": HUGGING_FACE_BERT, "word_embedding.weight": TIMM})
    positions = file.take("position_embedding.weight")[: encoder.config.max_positions]
    if file.names:
        token_types = file.take("embeddings.token_type_embeddings.weight")
        positions = positions + token_types[0]
    _fill(
        encoder,
        file,
        {"position_embedding.weight": positions},
        "set text_width, vocab_size and max_positions (at most the file's) to the file's",
    )
