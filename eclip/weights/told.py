"""What the file of a CLIP or SigLIP tells of it: the settings of the model that its towers need.

Widths, depths, patches and positions are shapes of tensors; heads and activation are not in them, and stand in the
configuration beside the file: Hugging Face's `config.json` and `preprocessor_config.json`, or `open_clip_config.json`.
Without one, what every published model of that size has is taken, and what differs among them is left to the user.

ViT, DINOv2 and BERT tell nothing here: their settings are given, as ever.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from eclip.model.image_encoder import PIXEL_STATISTICS
from eclip.model.settings import ModelConfig
from eclip.model.text_encoder import TEXT_EPS
from eclip.setting_rules import flag
from eclip.weights.weights_file import WeightsFile

Part = Literal["vision", "text"]
_HEAD_WIDTH, _WIDEST = 64, 1024  # of all published towers up to that width; beyond it they differ
_ACTIVATIONS = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
# What Hugging Face's configuration leaves out is as in its class.
_HEADS = {("clip", "vision"): 12, ("clip", "text"): 8, ("siglip", "vision"): 12, ("siglip", "text"): 12}
_HIDDEN_ACT = {"clip": "quick_gelu", "siglip": "gelu_pytorch_tanh"}
_OPENAI_CONSTANTS = ("input_resolution", "context_length")  # in the files that OpenAI itself published
IMAGE_SETTINGS = (
    *("vision_architecture", "vision_width", "vision_depth", "vision_heads", "vision_activation", "vision_eps"),
    *("patch_size", "image_size", "layer_scale", "pixel_statistics"),
)
TEXT_SETTINGS = (
    *("text_architecture", "text_width", "text_depth", "text_heads", "text_activation", "text_pooling"),
    "max_positions",
)
"""Fields of ModelConfig that a file tells."""
_FREE = ("image_size", "pixel_statistics", "vision_eps", "max_positions")  # may differ from the file's


@dataclass(frozen=True)
class Told:
    """A tower as its file and what lies beside it tell it."""

    settings: dict[str, Any]
    """Fields of ModelConfig; empty for a tower of another kind."""
    unknown: dict[str, str] = field(default_factory=dict)
    """Fields that nothing tells, and what they may be."""
    projection: int | None = None
    """Dimensions of the space that the file's own projection leads to."""


def image_settings(file: WeightsFile) -> Told:
    """Of an image tower. Raises ValueError for a CLIP or SigLIP that this model cannot be."""
    siglip = file.shape("attn_pool.latent") is not None
    if not siglip and file.shape("norm_pre.weight") is None:
        return Told({})
    kind = "siglip" if siglip else "clip"
    patches, positions = file.shape("patch_embed.proj.weight"), file.shape("pos_embed")
    if patches is not None and len(patches) == 2:
        raise ValueError(
            f"{file.path}: its image tower takes patches of any aspect (SigLIP 2 NaFlex), which is not read here; take "
            f"the one of a fixed size"
        )
    if patches is None or len(patches) != 4 or positions is None or len(positions) < 2:
        return Told({})  # a damaged file: loading it says what is missing
    width, side = patches[0], patches[-1]
    _check_mlp(file, width)
    beside = _Beside(file, kind, "vision", width)
    grid = round(max(1, positions[-2] - (not siglip)) ** 0.5)
    settings = {
        "vision_architecture": kind,
        "vision_width": width,
        "vision_depth": _depth(file),
        "patch_size": side,
        "image_size": grid * side,
        "layer_scale": False,
        "vision_eps": beside.eps,
        **beside.of({"heads": "vision_heads", "activation": "vision_activation", "pixels": "pixel_statistics"}),
    }
    names = {"heads": "vision_heads", "activation": "vision_activation", "pixels": "pixel_statistics"}
    return Told(settings, beside.unknown(names),
                None if siglip else _dimensions(file, "vision"))  # fmt: skip


def text_settings(file: WeightsFile) -> Told:
    """Of a text tower. Raises ValueError for a CLIP or SigLIP that this model cannot be."""
    words, positions = file.shape("word_embedding.weight"), file.shape("position_embedding.weight")
    known = file.shape("final_norm.weight") is not None
    if not known or words is None or len(words) != 2 or positions is None or len(positions) != 2:
        return Told({})
    kind, width = "siglip" if file.shape("head.weight") is not None else "clip", words[1]
    _check_mlp(file, width)
    beside = _Beside(file, kind, "text", width)
    if beside.eps != TEXT_EPS[kind]:
        raise ValueError(
            f"{file.path}: the configuration beside it has layer_norm_eps={beside.eps} of texts: a text tower of "
            f"{kind} is computed with {TEXT_EPS[kind]}; take another file"
        )
    settings = {
        "text_architecture": kind,
        "text_width": width,
        "text_depth": _depth(file),
        "max_positions": positions[0],
        "text_pooling": "last",
        **beside.of({"heads": "text_heads", "activation": "text_activation"}),
    }
    projection = None if kind == "siglip" else _dimensions(file, "text")
    return Told(settings, beside.unknown({"heads": "text_heads", "activation": "text_activation"}), projection)


def require_as_told(file: WeightsFile, told: Told, config: ModelConfig) -> None:
    """Raise ValueError, naming the flags, when a CLIP or SigLIP is of other settings than `config`."""
    wanted = {name: value for name, value in told.settings.items() if name not in _FREE}
    changed = {name: value for name, value in wanted.items() if getattr(config, name) != value}
    if changed:
        flags = " ".join(f"{flag(name)} {value}" for name, value in changed.items())
        raise ValueError(
            f"{file.path}: its tower is of other settings than the configuration: "
            f"{', '.join(f'{name}={getattr(config, name)}' for name in changed)}; set "
            f"{flags.replace('--layer-scale False', '--no-layer-scale')}"
        )


def _depth(file: WeightsFile) -> int:
    depth = 0
    while file.shape(f"blocks.{depth}.norm1.weight") is not None:
        depth += 1
    return depth


def _check_mlp(file: WeightsFile, width: int) -> None:
    hidden = file.shape("blocks.0.mlp.fc1.weight")
    if hidden is not None and hidden[0] != 4 * width:
        raise ValueError(
            f"{file.path}: the MLPs of its tower are {hidden[0]} wide, read are those of 4 x {width} = {4 * width}: "
            f"SigLIP so400m and CLIP's ViT-g and bigG are not; take a base or large one"
        )


def _dimensions(file: WeightsFile, part: Part) -> int | None:
    """Of the space that the file's own projection leads to."""
    found = projection_of(file, part)
    return None if found is None else file.every[found[0]].shape[1 if found[1] else 0]


def projection_of(file: WeightsFile, part: Part) -> tuple[str, bool] | None:
    """The name of the matrix from the tower into the common space, and whether it is (width, dimensions): OpenAI's are,
    Hugging Face's are (dimensions, width). None where there is none."""
    plain, transposed = ("visual_projection.weight", "proj") if part == "vision" else (
        "text_projection.weight", "text_projection")  # fmt: skip
    for name, turned in ((plain, False), (transposed, True)):
        key = file.beside(name)
        if key is not None and file.every[key].ndim == 2:
            return key, turned
    return None


def _json(path: Path) -> dict[str, Any]:
    """An object out of a file, empty when there is none."""
    try:
        record = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _below(record: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """An object inside an object, empty when there is none."""
    found: Any = record
    for name in names:
        found = found.get(name) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else {}


class _Beside:
    """What tensors do not tell of a tower: of its configuration, else of what every published one has."""

    def __init__(self, file: WeightsFile, kind: str, part: Part, width: int) -> None:
        self.file, self.kind, self.part, self.width = file, kind, part, width
        folder = file.path.parent
        record, opened = _json(folder / "config.json"), _json(folder / "open_clip_config.json")
        own = record.get("model_type") in (f"{kind}_{part}_model", f"{kind}_{part}")
        self.hugging_face = record if own else _below(record, f"{part}_config")
        # Of another model, as of one that has a CLIP's image tower beside a text tower of its own, what it says holds.
        self.known = own or (bool(self.hugging_face) and record.get("model_type") == kind)
        self.open_clip = _below(opened, "model_cfg")
        self.processor = {**_below(opened, "preprocess_cfg"), **_json(folder / "preprocessor_config.json")}

    @property
    def heads(self) -> int | None:
        """None: unknown."""
        given: Any = self.hugging_face.get(
            "num_attention_heads", _HEADS[self.kind, self.part] if self.known else None
        )
        if given is None and self.open_clip:
            config = _below(self.open_clip, f"{self.part}_cfg")
            head_width = config.get("head_width", _HEAD_WIDTH)
            given = config.get("heads", 8) if self.part == "text" else None
            if given is None and self.part == "vision" and isinstance(head_width, int) and head_width > 0:
                given = self.width // head_width
        if isinstance(given, int) and given > 0 and self.width % given == 0:
            return given
        usual = self.width <= _WIDEST and self.width % _HEAD_WIDTH == 0
        return self.width // _HEAD_WIDTH if usual else None

    @property
    def activation(self) -> str | None:
        """None: unknown."""
        name = self.hugging_face.get("hidden_act", _HIDDEN_ACT[self.kind] if self.known else None)
        if name is not None:
            if name not in _ACTIVATIONS:
                raise ValueError(
                    f"{self.file.path}: the config.json beside it has hidden_act={name!r}, which is not computed here; "
                    f"known are {', '.join(_ACTIVATIONS)}"
                )
            return _ACTIVATIONS[name]
        if self.kind == "siglip":
            return "gelu_tanh"
        if self.open_clip:
            return "quick_gelu" if self.open_clip.get("quick_gelu") else "gelu"
        return "quick_gelu" if any(name in self.file.every for name in _OPENAI_CONSTANTS) else None

    @property
    def eps(self) -> float:
        usual = TEXT_EPS[self.kind]
        given = self.hugging_face.get("layer_norm_eps", usual) if self.known else usual
        return float(given) if isinstance(given, int | float) else usual

    @property
    def pixels(self) -> str | None:
        """Key of PIXEL_STATISTICS; None: others."""
        given = [self.processor.get(f"image_{name}", self.processor.get(name)) for name in ("mean", "std")]
        if None in given:
            return "half" if self.kind == "siglip" else "clip"
        for name, statistics in PIXEL_STATISTICS.items():
            if all(_near(a, b) for a, b in zip(given, statistics, strict=True)):
                return name
        return None

    def of(self, names: Mapping[str, str]) -> dict[str, Any]:
        """What is known of these, under the names of our settings."""
        return {ours: value for name, ours in names.items() if (value := getattr(self, name)) is not None}

    def unknown(self, names: Mapping[str, str]) -> dict[str, str]:
        """What is not, and what it may be."""
        says = {
            "heads": "NUMBER",
            "activation": "quick_gelu (OpenAI's own and their kin) or gelu (LAION's)",
            "pixels": f"the nearest of {', '.join(PIXEL_STATISTICS)}",
        }
        return {ours: says[name] for name, ours in names.items() if getattr(self, name) is None}


def _near(given: Any, statistics: tuple[float, ...]) -> bool:
    numbers = isinstance(given, list) and len(given) == 3 and all(isinstance(x, int | float) for x in given)
    return numbers and all(abs(a - b) < 1e-3 for a, b in zip(given, statistics, strict=True))
