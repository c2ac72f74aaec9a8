"""Load a tower's weights from a local safetensors file: a ViT named by timm or Hugging Face, a BERT by the latter.

Each table below maps a parameter of our encoder (timm's names for images) to the names it may have in a file; `#` is
the block's number. Every parameter must be found, with its shape, and every tensor of the file's tower must be used: a
half-loaded tower trains without complaint and is worse than an error. Heads and poolers are left out. Weights of any
floating dtype become float32; NaN and infinity are refused.

Letters: D width, M and G patches along a side in the file and in the model.
"""

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from eclip.model.image_encoder import ImageEncoder
from eclip.model.text_encoder import TextEncoder
from eclip.weights.weights_file import Names, WeightsFile

log = logging.getLogger(__name__)

# Embeddings are padded to a multiple of 8 to 1024 rows; more of them are those of another vocabulary.
_MOST_PADDING = 1024


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


def interpolate_positions(positions: Tensor, grid: int) -> Tensor:
    """Resample a position embedding (1, 1+M*M, D), CLS first, to (1, 1+G*G, D), G = `grid`: bicubic, as DINOv2 does.

    Raises ValueError when there are not 1+M*M rows.
    """
    side = round(max(0, positions.shape[1] - 1) ** 0.5) if positions.ndim == 3 else 0
    if side == 0 or positions.shape[1] != 1 + side * side:
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


def load_image_weights(encoder: ImageEncoder, path: Path, *, tower: str | None = None) -> None:
    """Fill the encoder from a safetensors file of a Hugging Face ViT or DINOv2 or a timm ViT.

    tower: see `WeightsFile`. Positions are resampled to the configured grid. Raises ValueError, naming the key, when a
    tensor is missing, left over or of another shape; the encoder is then unchanged.
    """
    file = WeightsFile(
        path,
        {"embeddings.patch_embeddings.projection.weight": HUGGING_FACE_VIT, "patch_embed.proj.weight": TIMM},
        tower=tower,
        flag="--image-tower",
    )
    positions = file.take("pos_embed")
    try:
        positions = interpolate_positions(positions, encoder.config.grid)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    _fill(encoder, file, {"pos_embed": positions}, "set vision_width, vision_heads and patch_size to the file's")


def _word_rows(file: WeightsFile, vocab_size: int) -> Tensor:
    """The embedding's rows of the vocabulary's pieces: the first ones, where padding follows.

    Raises ValueError for fewer rows than pieces, and for so many more that they are another vocabulary's.
    """
    name = "word_embedding.weight"
    words = file.take(name)
    rows = len(words) if words.ndim == 2 else 0
    if not vocab_size <= rows < vocab_size + _MOST_PADDING:
        raise ValueError(
            f"{file.path}: {name} has shape {tuple(words.shape)}: {rows} rows for vocab_size={vocab_size} pieces; give "
            f"the --vocab-file of this very model"
        )
    if rows > vocab_size and (not dist.is_initialized() or dist.get_rank() == 0):
        log.warning(
            "%s: %d rows of the word embedding for %d pieces of the vocabulary: the last %d are left out as padding",
            file.path, rows, vocab_size, rows - vocab_size,
        )  # fmt: skip
    return words[:vocab_size]


def load_text_weights(encoder: TextEncoder, path: Path, *, tower: str | None = None) -> None:
    """Fill the encoder from a safetensors file of a Hugging Face BERT.

    tower: see `WeightsFile`. Rows of the word embedding beyond vocab_size are padding and cut, as are position rows
    beyond max_positions; the token-type row 0, the same for every token, is added to the rest. Raises ValueError,
    naming the key, when a tensor is missing, left over or of another shape; the encoder is then unchanged.
    """
    file = WeightsFile(
        path,
        {"embeddings.word_embeddings.weight": HUGGING_FACE_BERT, "word_embedding.weight": TIMM},
        tower=tower,
        flag="--text-tower",
    )
    positions = file.take("position_embedding.weight")[: encoder.config.max_positions]
    if file.names:
        token_types = file.take("embeddings.token_type_embeddings.weight")
        if token_types.shape[1:] != positions.shape[1:] or not len(token_types):
            raise ValueError(
                f"{path}: embeddings.token_type_embeddings.weight has shape {tuple(token_types.shape)}, positions are "
                f"of width {positions.shape[-1]}"
            )
        positions = positions + token_types[0]
    _fill(
        encoder,
        file,
        {
            "position_embedding.weight": positions,
            "word_embedding.weight": _word_rows(file, encoder.config.vocab_size),
        },
        "set text_width and max_positions (at most the file's) to the file's",
    )
