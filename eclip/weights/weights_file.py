"""One tower's tensors in a local safetensors file: which file it is, which tower, and what is missing or left over."""

import re
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from eclip.dataloading.file_kinds import HEAD, file_kind

Names = Mapping[str, tuple[str, ...]]
"""Our parameters and the names they may have in a file; `#` is the block's number."""

# Parts of published files that belong to no tower: pretraining and classification heads, constants.
UNUSED = re.compile(r"pooler\.|head|classifier\.|cls\.|(embeddings\.)?mask_token$|embeddings\.position_ids$")


_MERGE = "give one .safetensors file: safetensors.torch.save_file of what load_file reads from all parts"


def _kind(path: Path) -> str | None:
    """What a file is that is no safetensors file, and what to do; None for one that begins like it."""
    if path.is_dir():
        found = sorted(inside.name for inside in path.glob("*.safetensors"))
        return f"a folder; give the weights file itself{f', such as {path / found[0]}' if found else ''}"
    if not path.exists():
        return "absent, or a link to what is absent; give a file that is there"
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
        return f"JSON, perhaps the index of weights in several files; {_MERGE}"
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


# The end of a name that tells a tower which is not read here, or not for this flag.
_OTHERS = {
    "embeddings.word_embeddings.weight": "a text tower, for --text-weights",
    "embeddings.patch_embeddings.projection.weight": "an image tower, for --image-weights",
    "patch_embed.proj.weight": "an image tower, for --image-weights",
    "embeddings.patch_embedding.weight": "an image tower of Hugging Face's CLIP or SigLIP, which is not read here",
    "visual.conv1.weight": "an image tower of OpenAI's or open_clip's CLIP, which is not read here",
}
_ARCHITECTURES = {
    "--image-tower": "layer_scale: DINOv2 yes, ImageNet ViTs no; registers, distillation, SwiGLU, LoRA are not read",
    "--text-tower": "BERT's alone is read, not ALBERT's, DistilBERT's or adapters",
}
_PART = re.compile(r"-\d+-of-0*([2-9]|[1-9]\d+)\.safetensors$")
_SHOWN = 3  # names in a message


def _other_towers(path: Path, tensors: Collection[str]) -> str:
    """What a file without the wanted tower holds, to follow the name of the file."""
    if _PART.search(path.name):
        return f": it is one of several parts; {_MERGE}"
    found = [kind for end, kind in _OTHERS.items() if any(key == end or key.endswith(f".{end}") for key in tensors)]
    if found:
        return f"; it holds {' and '.join(dict.fromkeys(found))}"
    return f"; it holds no tower of a known kind, {', '.join(sorted(tensors)[:_SHOWN]) or 'nothing'}"


class WeightsFile:
    """One tower's tensors of a file, without their common prefix (`vit.`, `bert.`), counted off as they are read."""

    def __init__(self, path: Path, families: Mapping[str, Names], *, tower: str | None, flag: str) -> None:
        """`families`: from a tensor that tells a naming scheme to its table. tower: the beginning of the names of the
        tower that is meant, where the file has several; flag: the setting that gives it.

        Raises ValueError when there is none, or more than one.
        """
        self.path, self.architecture = path, _ARCHITECTURES[flag]
        tensors = _read(path)
        towers = _towers(tensors, families)
        if not towers:
            raise ValueError(f"{path}: none of {', '.join(families)} is in this file{_other_towers(path, tensors)}")
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
        if _PART.search(self.path.name):
            raise ValueError(f"{self.path}: no {keys[0]}: it is one of several parts; {_MERGE}")
        raise ValueError(
            f"{self.path}: no {' or '.join(keys)}; the model needs it as {name}: is this file's depth "
            f"and kind ({self.architecture}) that of the configuration?"
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
            more = f" (and {len(left) - 1} more)" if len(left) > 1 else ""
            raise ValueError(
                f"{self.path}: {left[0]}{more} has no place in the configured tower; set its depth to what the file "
                f"holds; is its kind that of the configuration ({self.architecture})?"
            )
