"""The settings that flags are read over when --image-weights or --text-weights name the file of a CLIP or SigLIP.

Whoever has a CLIP types its files and no shapes: what they tell (told.py) stands where the preset's values would, and
any flag overrides it. Files of other kinds change nothing.
"""

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from eclip.model.settings import ModelConfig
from eclip.setting_rules import flag
from eclip.weights.names import IMAGE_FAMILIES, TEXT_FAMILIES, Family
from eclip.weights.told import IMAGE_SETTINGS, TEXT_SETTINGS, Told, image_settings, text_settings
from eclip.weights.weights_file import WeightsFile

TowerFile = tuple[Path, str | None]
"""A file, and which of its towers."""


def told_settings(
    image: TowerFile | None,
    text: TowerFile | None,
    given: Collection[str],
    preset: ModelConfig,
    begun: ModelConfig | None = None,
) -> dict[str, Any]:
    """Fields of ModelConfig, of those towers that are a CLIP's or SigLIP's. Headers are read, and no weights.

    given: settings whose flag stands there; begun: the model of the run that is resumed, which needs its files no more.
    Raises ValueError when a tower is one that this model cannot be, or leaves something open that no flag says. What
    else is wrong with a file is said when it is loaded.
    """
    if begun is not None and not all(tower is None or tower[0].is_file() for tower in (image, text)):
        return _as_begun(begun, image is not None, text is not None)
    seen, read = Told({}), Told({})
    if (file := _header(image, IMAGE_FAMILIES, "--image-tower")) is not None:
        seen = _answered(image_settings(file), file.path, given)
    if (file := _header(text, TEXT_FAMILIES, "--text-tower")) is not None:
        read = _answered(text_settings(file), file.path, given)
    settings = {**seen.settings, **read.settings}
    return {**settings, **_common_space(seen, read, given, preset)} if settings else {}


def _header(tower: TowerFile | None, families: Mapping[str, Family], flag: str) -> WeightsFile | None:
    """None where there is no file, or none to be read."""
    if tower is None:
        return None
    try:
        return WeightsFile(tower[0], families, tower=tower[1], flag=flag, shapes=True)
    except ValueError:
        return None


def _as_begun(begun: ModelConfig, image: bool, text: bool) -> dict[str, Any]:
    """What the files of a run told when it began."""
    names: tuple[str, ...] = ()
    if image and begun.vision_architecture != "vit":
        names += IMAGE_SETTINGS
    if text and begun.text_architecture != "bert":
        names += TEXT_SETTINGS
    names += ("embed_dim", "decoder_heads", "slot_heads") if names else ()
    return {name: value for name, value in dataclasses.asdict(begun).items() if name in names}


def _answered(told: Told, path: Path, given: Collection[str]) -> Told:
    """Raises ValueError for a setting that neither the file nor a flag tells."""
    for name, choice in told.unknown.items():
        if name not in given:
            raise ValueError(
                f"{path}: it does not tell {name}: put the config.json of that model beside it, or give {flag(name)} "
                f"{choice}"
            )
    # Heads that the flag gives: until it is read, any number that divides the width.
    heads = {name: 1 for name in told.unknown if name.endswith("heads")}
    return dataclasses.replace(told, settings={**told.settings, **heads})


def _common_space(image: Told, text: Told, given: Collection[str], preset: ModelConfig) -> dict[str, Any]:
    """embed_dim of both towers' own space, where there is one, and heads of the decoder that divide it."""
    kinds = {image.settings.get("vision_architecture"), text.settings.get("text_architecture")}
    if kinds == {"siglip"}:
        widths = {image.settings["vision_width"], text.settings["text_width"]}
    else:
        widths = {image.projection, text.projection}
    width = widths.pop()
    if widths or width is None or "embed_dim" in given:
        return {}
    return {
        "embed_dim": width,
        "decoder_heads": next(heads for heads in range(preset.decoder_heads, 0, -1) if width % heads == 0),
        "slot_heads": next(heads for heads in range(preset.slot_heads, 0, -1) if width % heads == 0),
    }
