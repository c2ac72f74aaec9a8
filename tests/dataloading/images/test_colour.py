"""Colours against the formulas of their standards; what is transparent is white."""

import io

import numpy as np
import pytest
from PIL import Image, ImageCms

from eclip.dataloading.images.colour import is_srgb, to_srgb
from tests.dataloading.images.pictures import ADOBE_RGB, cmyk_profile, grey_profile, photo, rgb_profile, save

SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])
"""Linear sRGB to XYZ, adapted to D50."""
P3 = ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407))


def encoded(xyz: np.ndarray) -> np.ndarray:
    """XYZ to sRGB levels."""
    linear = (np.linalg.inv(SRGB) @ xyz).clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def shown(image: Image.Image, profile: bytes) -> np.ndarray:
    """The first pixel after the image went through a file with this profile."""
    kind = "TIFF" if image.mode in ("CMYK", "LAB") else "PNG"
    with Image.open(io.BytesIO(save(image, kind, icc_profile=profile))) as opened:
        opened.load()
        result = to_srgb(opened)
    assert result.mode == "RGB"
    return np.array(result.getpixel((0, 0)), int)


@pytest.mark.parametrize("colour", [(200, 30, 30), (219, 0, 0), (120, 180, 140), (0, 0, 0), (255,) * 3, (20, 30, 90)])
@pytest.mark.parametrize("primaries", [ADOBE_RGB, P3], ids=["Adobe RGB", "P3"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_wide_colours_become_srgb(
    colour: tuple[int, int, int], primaries: tuple[tuple[float, ...], ...], mode: str
) -> None:
    xyz = np.array(primaries).T @ (np.array(colour) / 255) ** 2.2
    image = Image.new("RGB", (8, 8), colour)
    image = image.quantize(4) if mode == "P" else image.convert(mode)
    assert np.abs(shown(image, rgb_profile(primaries)) - encoded(xyz)).max() <= 2


def test_grey_profile() -> None:
    expected = encoded(np.array([0.9642, 1, 0.8249]) * (100 / 255) ** 1.0)
    for mode in ("L", "LA"):
        assert np.abs(shown(Image.new("L", (8, 8), 100).convert(mode), grey_profile(1.0)) - expected).max() <= 2


def test_press_profile() -> None:
    lightness, a, b = 140 * 100 / 255, 200 - 128, 180 - 128
    f = (lightness + 16) / 116
    xyz = np.array([0.9642, 1, 0.8249]) * np.array([f + a / 500, f, f - b / 200]) ** 3
    result = shown(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), cmyk_profile((140, 200, 180)))
    assert np.abs(result - encoded(xyz)).max() <= 4
    assert shown(Image.new("CMYK", (8, 8)), cmyk_profile((140, 200, 180))).min() >= 254


def test_lab() -> None:
    grey = Image.merge("LAB", [Image.new("L", (8, 8), level) for level in (255 * 50 // 100, 128, 128)])
    assert np.abs(shown(grey, b"") - 119).max() <= 2  # L* = 50
    assert shown(Image.merge("LAB", [Image.new("L", (8, 8), level) for level in (140, 200, 180)]), b"")[0] > 200


@pytest.mark.parametrize(
    "mode, profile",
    [
        ("RGB", grey_profile(1.0)),
        ("RGB", cmyk_profile((140, 200, 180))),
        ("L", rgb_profile()),
        ("CMYK", rgb_profile()),
        ("RGB", b"not a profile"),
        ("RGB", bytes(400)),
        ("RGB", rgb_profile()[:200]),
        ("RGB", rgb_profile().replace(b"rTRC", b"xTRC")),
        ("RGB", rgb_profile().replace(b"mntr", b"link")),
        ("L", grey_profile(1.0)[:140]),
        ("CMYK", cmyk_profile((140, 200, 180))[:300]),
    ],
)
def test_profile_that_does_not_fit_or_is_broken_leaves_the_pixels(mode: str, profile: bytes) -> None:
    image = photo(mode)
    image.info["icc_profile"] = profile
    assert np.array_equal(np.asarray(to_srgb(image)), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("profile", [None, 7, "text", (1, 2), b""])
def test_profile_that_is_none(profile: object) -> None:
    image = photo()
    image.info["icc_profile"] = profile
    assert np.array_equal(np.asarray(to_srgb(image)), np.asarray(photo()))


def test_srgb_photos_are_left_as_they_are() -> None:
    """Their levels stay to the bit, whoever wrote the profile: no time is lost on most of the photos there are."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert is_srgb(srgb, "RGB") and not is_srgb(rgb_profile(), "RGB") and not is_srgb(rgb_profile(P3), "RGB")
    image = photo()
    image.info["icc_profile"] = srgb
    assert np.array_equal(np.asarray(to_srgb(image)), np.asarray(photo()))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P", "RGBa", "La"])
def test_transparent_is_white_and_half_is_half(mode: str) -> None:
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[:, 4:, 3], pixels[0, :, 3] = 255, 128
    image = Image.fromarray(pixels)
    if mode == "P":
        image = Image.fromarray(pixels[..., 3] // 100).convert("P")
        image.putpalette(bytes(768))
        image.info["transparency"] = bytes([0, 128, 255])
    elif mode == "PA":
        image = Image.new("P", (8, 8))
        image.putalpha(Image.fromarray(pixels[..., 3]))
    else:
        image = image.convert("LA").convert("La") if mode == "La" else image.convert(mode)
    assert image.mode == mode
    result = np.asarray(to_srgb(image)).astype(int)
    assert result[4, 0].tolist() == [255] * 3 and result[4, 6].tolist() == [0] * 3
    assert np.abs(result[0] - 127).max() <= 1


@pytest.mark.parametrize("mode, clear", [("1", 0), ("L", 0), ("RGB", (0, 0, 0)), ("P", 0)])
def test_transparent_colour_is_white(mode: str, clear: object) -> None:
    image = Image.new(mode, (8, 8))
    image.info["transparency"] = clear
    assert np.asarray(to_srgb(image)).min() == 255


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV"])
def test_other_modes_are_pillows_rgb(mode: str) -> None:
    image = Image.new("RGBX", (8, 8), (9, 99, 199)) if mode == "RGBX" else photo(mode)
    assert np.array_equal(np.asarray(to_srgb(image)), np.asarray(image.convert("RGB")))
