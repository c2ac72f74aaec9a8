"""Colours of an image to sRGB: ICC profiles, CMYK, Lab, palettes and transparency."""

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

_SPACES = {"RGB": "RGB ", "L": "GRAY", "CMYK": "CMYK", "LAB": "Lab "}
"""The colour space that a profile must be of, by Pillow's mode."""
_INTENT, _FLAGS = ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION  # as photo editors do
_SAME = 2  # levels of 255; the profiles in use that all mean sRGB differ by so much


def _grid(mode: str) -> Image.Image:
    """Pixels that show what a transform does: 9 levels a channel, all 256 for grey."""
    if mode == "L":
        return Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    levels = np.linspace(0, 255, 9).round().astype(np.uint8)
    return Image.fromarray(np.stack(np.meshgrid(levels, levels, levels), -1).reshape(1, -1, 3))


@lru_cache(maxsize=32)  # a profile of a shop's photos occurs thousands of times; building takes milliseconds
def _transform(profile: bytes | None, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From a profile (None: CIELAB) to sRGB; None where it changes nothing, is broken or is of other colours."""
    try:
        source = (
            ImageCms.createProfile("LAB") if profile is None else ImageCms.ImageCmsProfile(io.BytesIO(profile)).profile
        )
        if source.xcolor_space != _SPACES[mode]:
            return None
        transform = ImageCms.buildTransform(
            ImageCms.ImageCmsProfile(source),
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            _INTENT,
            _FLAGS,
        )
        if mode in ("RGB", "L"):
            before, after = _grid(mode), transform.apply(_grid(mode))
            change = np.abs(np.asarray(before.convert("RGB"), np.int16) - np.asarray(after, np.int16)).max()
            return transform if change > _SAME else None
        return transform
    except Exception:  # damaged profiles are common and their pixels good
        return None


def is_srgb(profile: bytes, mode: str) -> bool:
    """Whether the pixels of an image of this mode, RGB or L, stay as they are under this profile."""
    return _transform(profile, mode) is None


def to_srgb(image: Image.Image) -> Image.Image:
    """A decoded image of 8 bits a channel as RGB in sRGB, transparent pixels on white.

    Raises ValueError where Pillow knows no way to RGB.
    """
    profile = image.info.get("icc_profile")
    if image.mode in ("La", "RGBa"):
        image = image.convert(image.mode.upper())
    alpha = image.convert("RGBA") if image.has_transparency_data else None
    if image.mode in ("1", "L", "LA"):
        colours = image.convert("LA").getchannel("L") if alpha else image.convert("L")
    elif image.mode in _SPACES and alpha is None:
        colours = image
    else:
        colours = (alpha or image).convert("RGB")
    transform = None
    if colours.mode == "LAB":
        transform = _transform(None, "LAB")
    elif isinstance(profile, bytes) and profile:
        transform = _transform(profile, colours.mode)
    if transform is not None:
        colours = transform.apply(colours)
    rgb = colours if colours.mode == "RGB" else colours.convert("RGB")
    if alpha is None:
        return rgb
    rgb.putalpha(alpha.getchannel("A"))
    return Image.alpha_composite(Image.new("RGBA", rgb.size, "white"), rgb).convert("RGB")
