"""Load a tower's weights from a local safetensors file: ViT, DINOv2, BERT, and both towers of a CLIP or SigLIP.

The names are those of timm, Hugging Face, OpenAI or open_clip (names.py). Every parameter must be found, in its shape,
and every tensor of the file's tower must be used: a half-loaded tower trains without complaint and is worse than an
error. Heads and poolers of other tasks are left out. Weights of any floating dtype become float32; NaN and infinity are
refused.

Letters: D width, M and G patches along a side in the file and in the model, E dimensions of a CLIP's common space.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from eclip.model.image_encoder import ImageEncoder
from eclip.model.text_encoder import TextEncoder
from eclip.weights.names import HUGGING_FACE_BERT, IMAGE_FAMILIES, TEXT_FAMILIES
from eclip.weights.told import Part, Told, image_settings, projection_of, require_as_told, text_settings
from eclip.weights.weights_file import WeightsFile

log = logging.getLogger(__name__)

# Embeddings are padded to a multiple of 8 to 1024 rows; more of them are those of another vocabulary.
_MOST_PADDING = 1024


@dataclass(frozen=True)
class Loaded:
    """What a tower's file has for the model beside the tower itself; nothing of a ViT, DINOv2 or BERT."""

    path: Path
    architecture: str
    """`clip`, `siglip`, or another one's."""
    projection: Tensor | None = None
    """(E, D) from the tower's output into the space that image and text share."""
    projection_name: str = ""
    logit_scale: Tensor | None = None
    """(1,), the logarithm of the scale of CLIP's logits."""


def interpolate_positions(positions: Tensor, grid: int, *, cls: bool = True) -> Tensor:
    """Resample a position embedding (1, 1+M*M, D), CLS first, to (1, 1+G*G, D), G = `grid`: bicubic, as DINOv2 does.

    cls: False where no row is CLS's. Raises ValueError when there are not 1+M*M rows.
    """
    side = round(max(0, positions.shape[1] - cls) ** 0.5) if positions.ndim == 3 else 0
    if side == 0 or positions.shape[1] != cls + side * side:
        expected = "(1, 1+M*M, D), CLS first" if cls else "(1, M*M, D), without CLS"
        raise ValueError(f"a position embedding of shape {tuple(positions.shape)}: expected {expected}")
    if side == grid:
        return positions
    patches = positions[:, int(cls) :].float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([positions[:, : int(cls)].float(), patches.flatten(2).transpose(1, 2)], dim=1)


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


def load_image_weights(encoder: ImageEncoder, path: Path, *, tower: str | None = None) -> Loaded:
    """Fill the encoder from a safetensors file of a ViT, a DINOv2, or the image tower of a CLIP or SigLIP.

    tower: see `WeightsFile`. Positions are resampled to the configured grid. Raises ValueError, naming the key or the
    flags, when a tensor is missing, left over or of another shape, or the tower of another kind; the encoder is then
    unchanged.
    """
    file = WeightsFile(path, IMAGE_FAMILIES, tower=tower, flag="--image-tower")
    told = image_settings(file)
    require_as_told(file, told, encoder.config)
    has_cls = encoder.cls_token is not None
    positions = _rows(file.take("pos_embed"))
    try:
        prepared = {"pos_embed": interpolate_positions(positions, encoder.config.grid, cls=has_cls)}
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if has_cls:
        prepared["cls_token"] = _rows(file.take("cls_token"))
    if file.shape("attn_pool.qkv.weight") is not None:
        for leaf in ("weight", "bias"):
            query, keys_and_values = file.take(f"attn_pool.qkv.{leaf}").tensor_split([encoder.config.vision_width])
            prepared |= {f"attn_pool.q.{leaf}": query, f"attn_pool.kv.{leaf}": keys_and_values}
    _fill(encoder, file, prepared, "set vision_width, vision_heads and patch_size to the file's")
    return _loaded(file, told, "vision")


def _rows(embedding: Tensor) -> Tensor:
    """OpenAI's and Hugging Face's CLIP have (D,) and (1+N, D) where others have (1, 1, D) and (1, 1+N, D)."""
    return embedding if embedding.ndim > 2 else embedding.reshape(1, -1, embedding.shape[-1])


def _loaded(file: WeightsFile, told: Told, part: Part) -> Loaded:
    architecture = told.settings.get(f"{part}_architecture", "")
    found = projection_of(file, part) if told.projection is not None else None
    if found is None:
        return Loaded(file.path, architecture)
    name, turned = found
    matrix, scale = file.checked(name, file.every[name]), file.beside("logit_scale")
    return Loaded(
        path=file.path,
        architecture=architecture,
        projection=matrix.T if turned else matrix,
        projection_name=name,
        logit_scale=None if scale is None else file.checked(scale, file.every[scale]).reshape(-1)[:1],
    )


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


def load_text_weights(encoder: TextEncoder, path: Path, *, tower: str | None = None) -> Loaded:
    """Fill the encoder from a safetensors file of a Hugging Face BERT, or the text tower of a CLIP or SigLIP.

    tower: see `WeightsFile`. Rows of the word embedding beyond vocab_size are padding and cut, as are position rows
    beyond max_positions; BERT's token-type row 0, the same for every token, is added to the rest. Raises ValueError,
    naming the key or the flags, when a tensor is missing, left over or of another shape, or the tower of another kind;
    the encoder is then unchanged.
    """
    file = WeightsFile(path, TEXT_FAMILIES, tower=tower, flag="--text-tower")
    told = text_settings(file)
    require_as_told(file, told, encoder.config)
    positions = file.take("position_embedding.weight")[: encoder.config.max_positions]
    if file.names is HUGGING_FACE_BERT:
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
    return _loaded(file, told, "text")
