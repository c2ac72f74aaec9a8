"""Both decoders against Pillow's plain full decode and crop."""

import io
import itertools

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from eclip.dataloading.loader import ProductLoader
from eclip.dataloading.pipeline import CorruptImageError, decode_crop, decode_square
from eclip.dataloading.shards import ShardIndex
from eclip.dataloading.text import Tokenizer
from tests.dataloading.fixtures import jpeg, make_split


def oracle(data, size, box):
    """(size, size, 3): decode everything, turn upright, cut, resize."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box)).astype(int)


def encode(image, kind, **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


PLAIN = Image.open(io.BytesIO(jpeg(3, 61, 47)))
KINDS = {
    "baseline": jpeg(3, 61, 47),
    "progressive": jpeg(3, 61, 47, progressive=True),
    "4:4:4": jpeg(3, 61, 47, subsampling=0),
    "gray": jpeg(3, 61, 47, mode="L"),
    "cmyk": jpeg(3, 61, 47, mode="CMYK"),
    "png": encode(PLAIN, "PNG"),
    "png with alpha": encode(PLAIN.convert("RGBA"), "PNG"),
    "webp": encode(PLAIN, "WEBP", lossless=True),
    "rotated by EXIF": jpeg(3, 61, 47, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_crop_equals_the_oracle_where_nothing_is_scaled(kind):
    box = (5, 3, 45, 44)  # inside an image that was turned, too
    expected = oracle(KINDS[kind], 40, box)
    assert np.array_equal(decode_crop(KINDS[kind], 40, box, flip=False), expected.transpose(2, 0, 1))
    assert np.array_equal(decode_crop(KINDS[kind], 40, box, flip=True), expected[:, ::-1].transpose(2, 0, 1))


@pytest.mark.parametrize("width, height", [(640, 480), (637, 475), (333, 1001)])
@pytest.mark.parametrize("box", [(0.0, 0.0, 1.0, 1.0), (0.1, 0.2, 0.9, 0.8), (0.5, 0.5, 1.0, 1.0)])
def test_scaled_decode_is_near_the_oracle(width, height, box):
    data = jpeg(7, width, height, quality=95)
    pixels = tuple(round(c * n) for c, n in zip(box, (width, height) * 2, strict=True))
    difference = np.abs(decode_crop(data, 48, pixels, flip=False).transpose(1, 2, 0) - oracle(data, 48, pixels))
    # A shift by one pixel of the output would give 2 to 6 on average.
    assert difference.mean() < 0.6 and difference.max() <= 6


def test_scaled_decode_is_used():
    class Watched(io.BytesIO):
        pass

    image = Image.open(Watched(jpeg(0, 800, 800)))
    assert image.draft(None, (100, 100)) is not None and image.size == (100, 100)


def test_square_keeps_relative_places():
    pixels = np.zeros((60, 120, 3), np.uint8)
    pixels[30:, 90:] = (255, 0, 0)
    square = decode_square(encode(Image.fromarray(pixels), "PNG"), 32)
    assert square.shape == (3, 32, 32) and square.dtype == torch.uint8 and square.is_contiguous()
    red = (square[0] > 127).nonzero()
    assert red.min(0).values.tolist() == [16, 24] and red.max(0).values.tolist() == [31, 31]
    assert square[1:].max() == 0


@pytest.mark.parametrize("data", [b"", b"garbage" * 30, jpeg(0)[:60], jpeg(0)[:500], b"GIF89a" + b"\0" * 40])
def test_damaged_bytes_raise_one_kind_of_error(data):
    with pytest.raises(CorruptImageError) as error:
        decode_square(data, 32)
    assert str(error.value) and "\n" not in str(error.value) and "0x" not in str(error.value)


def test_dali_decodes_the_same_crops(tmp_path):
    pytest.importorskip("nvidia.dali")
    sizes = [(61, 47), (48, 48), (90, 70), (70, 110), (200, 150), (64, 40)]
    images = [*KINDS.values(), *(jpeg(i, *size) for i, size in enumerate(sizes))]
    folder = make_split(tmp_path, products=5, images=3, image=lambda p, i: images[3 * p + i])
    index = ShardIndex.open(folder, "train")
    tokenizer = Tokenizer.train(index.texts(), vocab_size=128)
    batches = {}
    for decoder in ("torch", "dali"):
        loader = ProductLoader(index, tokenizer, global_batch_size=5, image_size=40, decoder=decoder, num_workers=0)
        batches[decoder] = list(itertools.islice(loader, 12))
    seen = set()
    for mine, theirs in zip(batches["torch"], batches["dali"], strict=True):
        assert torch.equal(mine.image_rows, theirs.image_rows) and mine.keys == theirs.keys
        assert torch.equal(mine.tokens, theirs.tokens) and mine.step == theirs.step
        difference = (mine.images.int() - theirs.images.cpu().int()).abs()
        for rows, pair in zip(mine.image_rows.tolist(), difference, strict=True):
            for row, view in zip(rows, pair, strict=True):
                scaled = index.read_image(row) in images[-2:-1]  # 200 x 150: the torch path decodes at half size
                assert view.max() <= (8 if scaled else 2), index.image_key(row)
                seen.add(row)
    assert len(seen) == 15
