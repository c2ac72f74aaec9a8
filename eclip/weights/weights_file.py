"""One tower's tensors in a local safetensors file: which file it is, which tower, and what is missing or left over."""

import re
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from eclip.dataloading.file_kinds import HEAD, file_kind
from eclip.weights.names import Family

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


def _read(path: Path, *, shapes: bool = False) -> dict[str, Tensor]:
    """The file's tensors, or (shapes) empty ones on no device, for which the header alone is read.

    Raises ValueError, one line, for a file of another kind or a damaged one.
    """
    try:
        kind = _kind(path)
        if kind is None and shapes:
            with safe_open(path, framework="pt") as file:
                keys = file.keys()  # the file itself is no iterable
                return {key: torch.empty(file.get_slice(key).get_shape(), device="meta") for key in keys}
        if kind is None:
            return load_file(path)
    except Exception as error:  # safetensors raises its own SafetensorError, which derives from Exception alone
        words = " ".join(str(error).split())
        raise ValueError(f"{path}: not a readable safetensors file ({words}); download it again") from error
    raise ValueError(f"{path}: not a readable safetensors file but {kind}")


def _towers(tensors: Mapping[str, Tensor], families: Mapping[str, Family]) -> dict[str, Family]:
    """The beginning of the names of each tower in the file, and its naming scheme."""
    return {
        key.removesuffix(marker): family
        for marker, family in families.items()
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
_TEXT, _IMAGE = "a text tower, for --text-weights", "an image tower, for --image-weights"
_OTHERS = {
    "visual.layer1.0.conv1.weight": "a CLIP whose image tower is a ResNet, which is not read here (a ViT is)",
    "embeddings.word_embeddings.weight": _TEXT,
    "embeddings.token_embedding.weight": _TEXT,
    "ln_final.weight": _TEXT,
    "embeddings.patch_embeddings.projection.weight": _IMAGE,
    "patch_embed.proj.weight": _IMAGE,
    "embeddings.patch_embedding.weight": _IMAGE,
    "ln_pre.weight": _IMAGE,
}
_ARCHITECTURES = {
    "--image-tower": "--vision-architecture vit, clip or siglip; --layer-scale: DINOv2 yes, others no; registers, "
    "distillation, SwiGLU, LoRA are not read",
    "--text-tower": "--text-architecture bert, clip or siglip; ALBERT's, DistilBERT's or adapters are not read",
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

    def __init__(
        self, path: Path, families: Mapping[str, Family], *, tower: str | None, flag: str, shapes: bool = False
    ) -> None:
        """`families`: naming schemes, by a tensor that tells each. tower: the beginning of the names of the tower that
        is meant, where the file has several; flag: the setting that gives it. shapes: read no values, see `shape`.

        Raises ValueError when there is none, or more than one.
        """
        self.path, self.architecture = path, _ARCHITECTURES[flag]
        self.every = tensors = _read(path, shapes=shapes)
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
        self.prefix, family = wanted[0], towers[wanted[0]]
        self.names, self._unused = family.names, family.unused
        self.tensors = _of(tensors, self.prefix, towers)
        self.unread = set(self.tensors)

    def shape(self, name: str) -> torch.Size | None:
        """The shape of our parameter `name` in the file, None where it has none."""
        found = next((key for key in self._keys(name) if key in self.tensors), None)
        return None if found is None else self.tensors[found].shape

    def beside(self, *names: str) -> str | None:
        """The whole name, key of `every`, of what the file calls by one of `names` in the tower or beside it."""
        above, dot, _ = self.prefix.removesuffix(".").rpartition(".")
        places = [f"{prefix}{name}" for name in names for prefix in (self.prefix, above + dot)]
        return next((key for key in places if key in self.every), None)

    def _keys(self, name: str) -> list[str]:
        """The names that our parameter may have in the file."""
        generic = re.sub(r"^blocks\.(\d+)\.", "blocks.#.", name)
        number = name.split(".")[1] if generic != name else ""
        stem, _, leaf = generic.rpartition(".")
        if generic in self.names:
            return [key.replace("#", number) for key in self.names[generic]]
        if stem in self.names:
            return [f"{key.replace('#', number)}.{leaf}" for key in self.names[stem]]
        return [name]

    def take(self, name: str) -> Tensor:
        """The tensor of our parameter `name`. Raises ValueError naming the key the file lacks."""
        keys = self._keys(name)
        stem, _, leaf = name.rpartition(".")
        if keys == [name] and stem.endswith("attn.qkv") and self.names:
            base = name.removesuffix(f"qkv.{leaf}")
            parts = [self.take(f"{base}{part}.{leaf}") for part in "qkv"]
            if len({part.shape for part in parts}) > 1:
                shapes = ", ".join(str(tuple(part.shape)) for part in parts)
                raise ValueError(f"{self.path}: query, key and value of {name} have shapes {shapes}, not one")
            return torch.cat(parts)
        for key in keys:
            if key in self.tensors:
                self.unread.discard(key)
                return self.checked(key, self.tensors[key])
        if _PART.search(self.path.name):
            raise ValueError(f"{self.path}: no {keys[0]}: it is one of several parts; {_MERGE}")
        raise ValueError(
            f"{self.path}: no {' or '.join(keys)}; the model needs it as {name}: is this file's depth "
            f"and kind ({self.architecture}) that of the configuration?"
        )

    def checked(self, key: str, value: Tensor) -> Tensor:
        """A tensor as float32. Raises ValueError for whole numbers, NaN and infinity."""
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
        left = sorted(key for key in self.unread if not self._unused.match(key))
        if left:
            more = f" (and {len(left) - 1} more)" if len(left) > 1 else ""
            raise ValueError(
                f"{self.path}: {left[0]}{more} has no place in the configured tower; set its depth to what the file "
                f"holds; is its kind that of the configuration ({self.architecture})?"
            )
