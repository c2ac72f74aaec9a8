"""An image of any kind becomes the same pixels; what is none is told by name."""

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from eclip.dataloading.images import CorruptImageError
from eclip.dataloading.pipeline import decode_crop, decode_square
from eclip.inference.pictures import describe, is_picture, read_picture, to_jpeg

SIZE = 24


def noise(height: int = 37, width: int = 61, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (height, width, channels), dtype=np.uint8)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def test_every_way_to_give_an_image_gives_the_same_pixels(tmp_path: Path) -> None:
    array = noise()
    data = encoded(Image.fromarray(array), "PNG")
    path = tmp_path / "ein Stuhl.png"
    path.write_bytes(data)
    ways: list[Any] = [data, bytearray(data), memoryview(data), path, str(path), Image.fromarray(array), array]
    ways += [array[::1, ::1], np.asfortranarray(array), Image.open(path)]
    read = [read_picture(way, SIZE) for way in ways]
    assert all(pixels.size == (61, 37) and pixels.square.shape == (3, SIZE, SIZE) for pixels in read)
    assert all(torch.equal(pixels.square, read[0].square) for pixels in read[1:])
    assert torch.equal(read[0].square, decode_square(data, SIZE))  # evaluation's pixels


def test_a_jpeg_is_decoded_as_in_evaluation() -> None:
    data = encoded(Image.fromarray(noise(400, 300)), "JPEG")
    assert torch.equal(read_picture(data, SIZE).square, decode_square(data, SIZE))
    # The decoder makes it at an eighth; its size is that of the file all the same.
    assert read_picture(data, SIZE).size == (300, 400)
    box = (20.0, 30.0, 120.0, 90.0)
    cropped = decode_crop(data, SIZE, box, flip=False)
    assert np.array_equal(read_picture(data, SIZE, box).square.numpy(), cropped)


@pytest.mark.parametrize("kind", ["BMP", "GIF", "TIFF", "WEBP", "PPM", "ICO"])
def test_formats_that_shards_do_not_hold_are_read(kind: str) -> None:
    image = Image.fromarray(noise(32, 32))
    assert read_picture(encoded(image, kind), SIZE).size == (32, 32)


def test_grey_alpha_palettes_and_turned_photos() -> None:
    grey = noise(channels=1)
    same = read_picture(np.repeat(grey, 3, axis=2), SIZE).square
    assert torch.equal(read_picture(grey, SIZE).square, same)
    assert torch.equal(read_picture(grey[:, :, 0], SIZE).square, same)
    clear = np.dstack([noise(), np.zeros((37, 61), np.uint8)])
    assert (read_picture(clear, SIZE).square == 255).all()  # transparent is white
    exif = Image.Exif()
    exif[274] = 6  # the camera was turned
    turned = read_picture(encoded(Image.fromarray(noise()), "JPEG", exif=exif), SIZE)
    assert turned.size == (37, 61)
    held = Image.open(io.BytesIO(encoded(Image.fromarray(noise()), "JPEG", exif=exif)))
    assert read_picture(held, SIZE).size == (37, 61) and held.size == (61, 37)  # the caller's image is as it was
    assert read_picture(Image.fromarray(noise()).convert("CMYK"), SIZE).square.shape == (3, SIZE, SIZE)


@pytest.mark.parametrize(
    "picture, words",
    [
        (b"", "empty file"),
        (b"no picture", "not a readable image header"),
        (encoded(Image.fromarray(noise()), "PNG")[:200], "truncated|cannot be decoded"),
        ("missing.jpg", "file not found"),
        (".", "not a regular file"),
        ("/dev/null", "not a regular file"),
        ("a\0b.jpg", "cannot be read"),
        ("https://example.com/a.jpg", "fetch it first"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
    ],
)
def test_an_image_that_cannot_be_read(picture: Any, words: str) -> None:
    with pytest.raises(CorruptImageError, match=words):
        read_picture(picture, SIZE)


@pytest.mark.parametrize(
    "picture, words",
    [
        (noise().astype(np.float32), "float32"),
        (noise(channels=2), r"\(37, 61, 2\)"),
        (noise().transpose(2, 0, 1), "channels last"),
        (np.zeros((0, 5, 3), np.uint8), r"\(0, 5, 3\)"),
        (np.zeros(5, np.uint8), r"\(5,\)"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), "permute"),
        (None, "NoneType"),
        (7, "int"),
    ],
)
def test_what_is_no_image(picture: Any, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        read_picture(picture, SIZE)


@pytest.mark.parametrize(
    "box", [(0, 0, 0, 9), (5, 5, 2, 9), (1, 2, 3), (0, 0, float("nan"), 9), "abcd", (70, 0, 80, 9)]
)
def test_a_box_that_holds_nothing(box: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(f"box {box!r}")):
        read_picture(noise(), SIZE, box)


def test_names_for_messages() -> None:
    assert describe(Path("a/b.jpg")) == "a/b.jpg" and describe(b"abc") == "3 bytes"
    assert describe(noise()) == "an array (37, 61, 3) of uint8"
    assert describe(Image.new("RGB", (4, 5))) == "a PIL image of 4 x 5 px" and describe(None) == "a NoneType"
    assert is_picture("x") and is_picture(noise()) and not is_picture(noise()[None]) and not is_picture(["x"])


def test_a_thumbnail_is_small_and_upright() -> None:
    exif = Image.Exif()
    exif[274] = 6
    small = Image.open(io.BytesIO(to_jpeg(encoded(Image.fromarray(noise(300, 600)), "JPEG", exif=exif), 128)))
    assert small.format == "JPEG" and small.size == (64, 128) and not small.getexif()
    assert Image.open(io.BytesIO(to_jpeg(noise(), 128))).size == (61, 37)  # never enlarged
