"""Load a tower's weights from a local safetensors file: a ViT named by timm or Hugging Face, a BERT by the latter.

Each table below maps a parameter of our encoder (timm's names for images) to the names it may have in a file; `#` is
the block's number. Every parameter must be found, with its shape, and every tensor of the file's tower must be used: a
half-loaded tower trains without complaint and is worse than an error. Heads and poolers are left out. Weights of any
floating dtype become float32; NaN and infinity are refused.

Letters: D width, M and G patches along a side in the file and in the model.
"""

import logging
import re
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from eclip.dataloading.file_kinds import HEAD, file_kind
from eclip.model.image_encoder import ImageEncoder
from eclip.model.text_encoder import TextEncoder

log = logging.getLogger(__name__)

Names = Mapping[str, tuple[str, ...]]

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

# Parts of published files that belong to no tower: pretraining and classification heads, constants.
UNUSED = re.compile(r"pooler\.|head|classifier\.|cls\.|(embeddings\.)?mask_token$|embeddings\.position_ids$")


def _kind(path: Path) -> str | None:
    """What a file is that is no safetensors file, and what to do; None for one that begins like it."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(HEAD)
    kind = file_kind(head)
    if head.startswith(b"PK") or (kind and "pickle" in kind):
        return (
            "a PyTorch file (.bin, .pt, .pth), which may run code when it is read; give the model's .safetensors, or "
            "write one with safetensors.torch.save_file(torch.load(path, weights_only=True), new_path)"
        )
    if head.lstrip().startswith(b"{"):
        return "JSON, perhaps the index of weights in several files; give one .safetensors file that holds the tower"
    if kind:
        return f"{kind}; download it again"
    header = int.from_bytes(head[:8], "little")
    if len(head) > 8 and head[8:9] == b"{" and 8 + header > size:
        return f"truncated: its header alone has {header} bytes, the file {size}; download it again"
    return None


def _read(path: Path) -> dict[str, Tensor]:
    """The file's tensors. Raises ValueError, one line, for a file of another kind or a damaged one."""
    try:
        kind = _kind(path)
        if kind is None:
            return load_file(path)
    except Exception as error:  # safetensors raises its own SafetensorError, which derives from Exception alone
        words = " ".join(str(error).split())
        raise ValueError(f"{path}: not a readable safetensors file ({words}); download it again") from error
    raise ValueError(f"{path}: not a readable safetensors file but {kind}")


def _towers(tensors: Mapping[str, Tensor], families: Mapping[str, Names]) -> dict[str, Names]:
    """The beginning of the names of each tower in the file, and its table."""
    return {
        key.removesuffix(marker): names
        for marker, names in families.items()
        for key in tensors
        if key == marker or key.endswith(f".{marker}")
    }


def _of(tensors: Mapping[str, Tensor], prefix: str, towers: Collection[str]) -> dict[str, Tensor]:
    """The tensors of the tower that begins so, without that beginning, and not those of a tower within it."""
    within = tuple(p for p in towers if p != prefix and p.startswith(prefix))
    # BERT files converted from TensorFlow call a LayerNorm's weight and bias gamma and beta.
    return {
        re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", key))
        .removeprefix(prefix): value
        for key, value in tensors.items()
        if key.startswith(prefix) and not (within and key.startswith(within))
    }  # fmt: skip


def _meant(towers: Collection[str], tower: str | None) -> list[str]:
    """The prefixes that `tower` says: that very one, else those that begin with it."""
    if tower is None:
        return list(towers)
    start = f"{tower.rstrip('.')}." if tower else ""
    return [start] if start in towers else [prefix for prefix in towers if prefix.startswith(start)]


class WeightsFile:
    """One tower's tensors of a file, without their common prefix (`vit.`, `bert.`), counted off as they are read."""

    def __init__(self, path: Path, families: Mapping[str, Names], *, tower: str | None, flag: str) -> None:
        """`families`: from a tensor that tells a naming scheme to its table. tower: the beginning of the names of the
        tower that is meant, where the file has several; flag: the setting that gives it.

        Raises ValueError when there is none, or more than one.
        """
        self.path = path
        tensors = _read(path)
        towers = _towers(tensors, families)
        if not towers:
            raise ValueError(
                f"{path}: none of {', '.join(families)} is in this file; it holds no tower of a known kind"
            )
        wanted = _meant(towers, tower)
        if len(wanted) != 1:
            counts = ", ".join(
                f"{p.rstrip('.') or repr('')} ({len(_of(tensors, p, towers))} tensors)"
                for p in sorted(wanted or towers)
            )
            missing = "" if wanted else f"no tower {tower!r}; "
            raise ValueError(f"{path}: {missing}it holds {counts}; say which with {flag}")
        self.names = towers[wanted[0]]
        self.tensors = _of(tensors, wanted[0], towers)
        self.unread = set(self.tensors)

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
            parts = [self.take(f"{base}{part}.{leaf}") for part in "qkv"]
            if len({part.shape for part in parts}) > 1:
                shapes = ", ".join(str(tuple(part.shape)) for part in parts)
                raise ValueError(f"{self.path}: query, key and value of {name} have shapes {shapes}, not one")
            return torch.cat(parts)
        else:
            keys = [name]
        for key in keys:
            if key in self.tensors:
                self.unread.discard(key)
                return self._checked(key)
        raise ValueError(
            f"{self.path}: no {' or '.join(keys)}; the model needs it as {name}: is this file's depth "
            f"and kind (layer_scale: DINOv2 yes, ImageNet ViTs no) that of the configuration?"
        )

    def _checked(self, key: str) -> Tensor:
        """A tensor as float32. Raises ValueError for whole numbers, NaN and infinity."""
        value = self.tensors[key]
        if not value.is_floating_point():
            raise ValueError(
                f"{self.path}: {key} is {str(value.dtype).removeprefix('torch.')}: quantised weights are not read; "
                f"give the file in float32, float16 or bfloat16"
            )
        value = value.float()
        if bad := value.numel() - int(torch.isfinite(value).sum()):
            raise ValueError(
                f"{self.path}: {bad} of {value.numel()} values of {key} are NaN or infinite; take another file"
            )
        return value

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
