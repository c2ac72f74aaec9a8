"""DALI on tars that others have made: what it shows is what the torch path and packing show."""

import io
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from eclip.dataloading.images import corrupt, encode_image, open_image, plain
from eclip.dataloading.loader import ProductLoader
from eclip.dataloading.pipeline import decode_square
from eclip.dataloading.shards import ShardIndex
from eclip.dataloading.text import Tokenizer
from tests.dataloading.fixtures import jpeg, make_split
from tests.dataloading.images.pictures import (
    cmyk_profile,
    exif_block,
    grey_profile,
    photo,
    png,
    png_chunk,
    rgb_profile,
    save,
)

# pytest takes the place of the filter that decode.py sets
pytestmark = pytest.mark.filterwarnings(r"ignore:::PIL\.")

DEEP = np.full((50, 60), 40000, np.uint16)
CLEAR = Image.new("LA", (60, 50), (0, 0))
ODD = {
    "16 bits grey": png(DEEP),
    "16 bits rgb": png(np.stack([DEEP, DEEP // 2, DEEP // 4], -1)),
    "16 bits rgba": png(np.stack([DEEP, DEEP, DEEP, DEEP], -1)),
    "16 bits, one level clear": png(DEEP, png_chunk(b"tRNS", (40000).to_bytes(2, "big"))),
    "alpha": save(photo("RGBA"), "PNG"),
    "all clear": save(CLEAR, "PNG"),
    "grey alpha": save(photo("LA"), "PNG"),
    "palette": save(photo("P"), "PNG"),
    "palette with alpha": save(photo("P"), "PNG", transparency=bytes(range(0, 250, 5))),
    "one colour clear": save(Image.new("RGB", (60, 50), (9, 9, 9)), "PNG", transparency=(9, 9, 9)),
    "1 bit": save(photo("1"), "PNG"),
    "2 bits": save(Image.new("L", (60, 50), 170), "PNG", bits=2),
    "interlaced": png(np.asarray(photo()), interlace=True),
    "animated png": save(photo(), "PNG", save_all=True, append_images=[photo("L").convert("RGB")]),
    "gamma chunk": png(np.asarray(photo()), png_chunk(b"gAMA", (100000).to_bytes(4, "big"))),
    "cmyk": jpeg(5, 60, 50, mode="CMYK"),
    "cmyk of a press": jpeg(5, 60, 50, mode="CMYK", icc_profile=cmyk_profile((140, 200, 180))),
    "wide colours": jpeg(5, 60, 50, icc_profile=rgb_profile()),
    "linear grey": jpeg(5, 60, 50, mode="L", icc_profile=grey_profile(1.0)),
    "wide colours png": save(photo(), "PNG", icc_profile=rgb_profile()),
    "sideways": jpeg(5, 60, 50, exif=exif_block()),
    "sideways, broken tag": jpeg(
        5, 60, 50,
        exif=b"Exif\0\0II*\0\x08\0\0\0\2\0\x12\1\3\0\1\0\0\0\6\0\0\0\x1a\1\x0a\0\1\0\0\0\x99\x99\0\0\0\0\0\0",
    ),
    "sideways png": save(photo(), "PNG", exif=exif_block()),
    "webp": save(photo(), "WEBP"),
    "webp alpha": save(photo("RGBA"), "WEBP", lossless=True),
    "webp animated": save(photo(), "WEBP", save_all=True, append_images=[photo("L").convert("RGB")]),
    "sideways webp": save(photo(), "WEBP", exif=exif_block()),
}  # fmt: skip


def open_split(folder: Path, *, products: int, each: int, data: list[bytes]) -> tuple[ShardIndex, Tokenizer]:
    make_split(folder, products=products, images=each, image=lambda p, i: data[(p * each + i) % len(data)])
    index = ShardIndex.open(folder, "train")
    return index, Tokenizer.train(index.texts(), vocab_size=128)


def beside_good_ones(data: list[bytes]) -> list[bytes]:
    return [image for number, bad in enumerate(data) for image in (bad, jpeg(number, 70, 60))]


@pytest.mark.parametrize("name", ODD)
def test_both_decoders_see_what_packing_stores(tmp_path: Path, name: str) -> None:
    (tmp_path / "image").write_bytes(ODD[name])
    stored = Image.open(io.BytesIO(encode_image(tmp_path / "image", quality=95)[0]))
    packed = np.asarray(stored.resize((40, 40), Image.Resampling.BICUBIC)).astype(int)
    shown = decode_square(ODD[name], 40).numpy().transpose(1, 2, 0)
    # A JPEG is between the two (6 levels for the dots of a palette); an image that is turned, not blended or not scaled
    # would be 20 to 200 away.
    assert np.abs(shown - packed).mean() < (8 if "palette" in name else 5)
    if name == "16 bits grey":
        assert (shown == 156).all()
    if name in ("all clear", "16 bits, one level clear", "one colour clear"):
        assert (shown == 255).all()


def test_dali_shows_odd_images_as_torch_does(tmp_path: Path) -> None:
    pytest.importorskip("nvidia.dali")
    data = [*ODD.values(), *(jpeg(i, 70, 60) for i in range(3))]
    index, tokenizer = open_split(tmp_path, products=10, each=3, data=data)
    batches = {}
    for decoder in ("torch", "dali"):
        loader = ProductLoader(index, tokenizer, global_batch_size=10, image_size=40, decoder=decoder, num_workers=0)
        batches[decoder] = list(itertools.islice(loader, 8))
        assert not loader.corrupt
    seen, names = set(), [*ODD, "plain", "plain", "plain"]
    for mine, theirs in zip(batches["torch"], batches["dali"], strict=True):
        assert mine.keys == theirs.keys
        difference = (mine.images.int() - theirs.images.cpu().int()).abs()
        for rows, pair in zip(mine.image_rows.tolist(), difference, strict=True):
            for row, view in zip(rows, pair, strict=True):
                # DALI's own resize: up to 7 at steep edges; a shift by a pixel would give 2 to 6 on average.
                own = plain(open_image(data[row]))
                assert view.max() <= (8 if own else 1) and view.float().mean() < 0.5, names[row]
                seen.add(row)
    assert len(seen) == len(data) == 30


def test_both_decoders_refuse_what_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corrupt, "MAX_PIXELS", 70 * 60)
    large = [jpeg(1, 71, 60), save(photo("RGBA", 70, 61), "PNG"), save(photo("RGB", 90, 50), "WEBP")]
    large.append(jpeg(2, 80, 80, mode="CMYK"))
    index, tokenizer = open_split(tmp_path, products=4, each=2, data=beside_good_ones(large))
    found = {}
    for decoder in ("torch", "dali"):
        if decoder == "dali":
            pytest.importorskip("nvidia.dali")
        loader = ProductLoader(index, tokenizer, global_batch_size=4, image_size=32, decoder=decoder, num_workers=0)
        assert all(torch.equal(b.image_rows[:, 0], b.image_rows[:, 1]) for b in itertools.islice(loader, 3))
        found[decoder] = loader.corrupt
    assert found["torch"] == found["dali"] and len(found["torch"]) == 4
    for reason in found["torch"].values():
        assert reason.startswith("more than 0.0042 megapixels (") and reason.endswith(" px)")


def test_damage_has_the_same_reason_whoever_decodes(tmp_path: Path) -> None:
    pytest.importorskip("nvidia.dali")
    whole = jpeg(1, 70, 60)
    damaged = [whole[: len(whole) // 2], b"", b"<!DOCTYPE html>", save(photo("RGBA"), "PNG")[:600]]
    damaged.append(b"\xff\xd8\xff" + bytes(50))
    index, tokenizer = open_split(tmp_path, products=5, each=2, data=beside_good_ones(damaged))
    found = {}
    for decoder in ("torch", "dali"):
        loader = ProductLoader(index, tokenizer, global_batch_size=5, image_size=32, decoder=decoder, num_workers=0)
        list(itertools.islice(loader, 4))
        found[decoder] = loader.corrupt
    assert found["torch"] == found["dali"] and len(found["torch"]) == 5
