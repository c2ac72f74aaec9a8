"""Whether an image's header shows that every decoder gives the same pixels."""

import numpy as np
import pytest
from PIL import Image, ImageCms

from eclip.dataloading.images import encode_image, open_image
from eclip.dataloading.images.decode import STORED
from eclip.dataloading.images.headers import plain, plain_bytes, png_chunks
from tests.dataloading.fixtures import jpeg
from tests.dataloading.images.pictures import exif_block, grey_profile, photo, png, png_chunk, rgb_profile, save

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
UPRIGHT = Image.Exif()
UPRIGHT.update({0x0112: 1, 0x010F: "maker"})
SIDEWAYS_XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
EIGHT = np.asarray(photo())

BY_BYTES = {
    "jpeg": jpeg(0),
    "progressive": jpeg(0, progressive=True),
    "grey": jpeg(0, mode="L"),
    "with a comment": jpeg(0, comment="by us"),
    "png": save(photo(), "PNG"),
    "grey png": save(photo("L"), "PNG"),
    "webp": save(photo(), "WEBP"),
}
BY_PILLOW = {
    "jpeg of a camera": jpeg(0, exif=UPRIGHT, icc_profile=SRGB),
    "grey, sRGB's curve": jpeg(0, mode="L", icc_profile=SRGB),  # of RGB: does not fit and is left out
    "png of a camera": save(photo(), "PNG", exif=UPRIGHT, icc_profile=SRGB),
    "webp of a camera": save(photo(), "WEBP", exif=UPRIGHT, icc_profile=SRGB),
    "webp without loss": save(photo(), "WEBP", lossless=True),
    "interlaced": png(EIGHT, interlace=True),
}
NOT = {
    "sideways": jpeg(0, exif=exif_block()),
    "sideways by XMP": jpeg(0, xmp=SIDEWAYS_XMP),
    "sideways png": save(photo(), "PNG", exif=exif_block()),
    "sideways webp": save(photo(), "WEBP", exif=exif_block()),
    "wide colours": jpeg(0, icc_profile=rgb_profile()),
    "grey of another gamma": jpeg(0, mode="L", icc_profile=grey_profile(1.0)),
    "wide colours png": save(photo(), "PNG", icc_profile=rgb_profile()),
    "wide colours webp": save(photo(), "WEBP", icc_profile=rgb_profile()),
    "cmyk": jpeg(0, mode="CMYK"),
    "alpha": save(photo("RGBA"), "PNG"),
    "grey alpha": save(photo("LA"), "PNG"),
    "palette": save(photo("P"), "PNG"),
    "palette with alpha": save(photo("P"), "PNG", transparency=bytes(9)),
    "one colour is clear": save(photo(), "PNG", transparency=(0, 0, 0)),
    "1 bit": save(photo("1"), "PNG"),
    "4 bits": save(photo("L"), "PNG", bits=4),
    "16 bits": save(photo("I;16"), "PNG"),
    "16 bits rgb": png(np.zeros((40, 40, 3), np.uint16)),
    "animated png": save(photo(), "PNG", save_all=True, append_images=[photo("L").convert("RGB")]),
    "animated webp": save(photo(), "WEBP", save_all=True, append_images=[photo("L").convert("RGB")]),
    "alpha webp": save(photo("RGBA"), "WEBP"),
    "alpha webp without loss": save(photo("RGBA"), "WEBP", lossless=True),
}


@pytest.mark.parametrize("name", [*BY_BYTES, *BY_PILLOW, *NOT])
def test_plain(name: str) -> None:
    data = {**BY_BYTES, **BY_PILLOW, **NOT}[name]
    assert plain_bytes(data) == (name in BY_BYTES or name == "interlaced")
    assert plain(open_image(data)) == (name not in NOT)


def test_orientation_behind_the_pixels_is_seen() -> None:
    data = save(photo(), "PNG")
    end = data.index(b"IEND") - 4
    data = data[:end] + png_chunk(b"eXIf", exif_block().tobytes()[6:]) + data[end:]
    assert not plain_bytes(data) and not plain(open_image(data))
    assert [name for name, _ in png_chunks(data)][-2:] == [b"eXIf", b"IEND"]


def test_packed_images_are_plain(tmp_path) -> None:
    for number, data in enumerate([*BY_PILLOW.values(), *NOT.values()]):
        (tmp_path / "image").write_bytes(data)
        assert plain_bytes(encode_image(tmp_path / "image")[0]), number


@pytest.mark.parametrize("data", [jpeg(0), save(photo(), "PNG"), save(photo(), "WEBP"), b"", b"GIF89a" + bytes(99)])
def test_any_bytes_have_an_answer(data: bytes) -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(data[: rng.integers(0, len(data) + 1)])
        for _ in range(rng.integers(0, 4)):
            if damaged:
                damaged[rng.integers(0, len(damaged))] = rng.integers(0, 256)
        assert plain_bytes(bytes(damaged)) in (True, False)
    assert STORED == ("JPEG", "PNG", "WEBP")
