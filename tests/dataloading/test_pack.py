"""Writing shards, and packing a user's own table and images."""

import csv
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eclip.dataloading import pack
from eclip.dataloading.pack import encode_image, image_name, pack_catalog, write_shards
from eclip.dataloading.schema import ImageRecord, Product


def product(key: str, files: tuple[str, ...] = (image_name(0), image_name(1))) -> tuple[Product, list[bytes]]:
    records = tuple(ImageRecord(file=file) for file in files)
    facts = Product(key=key, product=key, title="A chair", category="Chairs", catalog="c", images=records)
    return facts, [f"{key}{i}".encode() * 100 for i in range(len(files))]


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {m.name: tar.extractfile(m).read() for m in tar}


def photo(path: Path, width: int = 60, height: int = 40, **options) -> Path:
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(noise).save(path, **options)
    return path


def test_write_shards(tmp_path: Path) -> None:
    (tmp_path / "train-000007.tar").write_bytes(b"old")
    (tmp_path / "train.index.npz").write_bytes(b"old")
    (tmp_path / "val-000000.tar").write_bytes(b"another split")
    tars = write_shards((product(f"p{i}") for i in range(5)), tmp_path, "train", max_bytes=4096)
    assert [t.name for t in tars] == [f"train-{n:06d}.tar" for n in range(len(tars))] and len(tars) > 1
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*(t.name for t in tars), "val-000000.tar"])
    names = [name for tar in tars for name in members(tar)]
    assert names == [f"p{i}.{suffix}" for i in range(5) for suffix in ("json", "000.jpg", "001.jpg")]
    first = members(tars[0])
    assert Product.from_json(first["p0.json"], where="p0") == product("p0")[0]
    assert first["p0.001.jpg"] == b"p01" * 100


def test_equal_content_gives_equal_bytes(tmp_path: Path) -> None:
    one, two = (write_shards([product("p")], tmp_path / name, "train")[0].read_bytes() for name in "ab")
    assert one == two


@pytest.mark.parametrize(
    "samples, message",
    [
        ([product("a.b")], "key 'a.b'"),
        ([product("k" * 81)], "1 to 80"),
        ([product("p"), product("p")], "occurs twice"),
        ([(product("p")[0], [b"x"])], "1 images for 2 records"),
        ([product("p", files=())], "at least one"),
        ([product("p", files=("x.jpg",))], "'x.jpg'"),
        ([], "no product"),
    ],
)
def test_bad_samples_leave_the_old_shards_alone(tmp_path: Path, samples: list, message: str) -> None:
    write_shards([product("old")], tmp_path, "train")
    with pytest.raises(ValueError) as error:
        write_shards(samples, tmp_path, "train")
    assert message in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["train-000000.tar"]
    assert "old.json" in members(tmp_path / "train-000000.tar")


def test_encode_image_resizes_and_keeps_small_ones(tmp_path: Path) -> None:
    data, width, height = encode_image(photo(tmp_path / "a.png", 600, 400), short_side=100)
    assert (width, height) == (150, 100)
    with Image.open(io.BytesIO(data)) as picture:
        assert picture.format == "JPEG" and picture.size == (150, 100)
    assert encode_image(photo(tmp_path / "b.png", 60, 40))[1:] == (60, 40)


def test_encode_image_bakes_exif(tmp_path: Path) -> None:
    picture = Image.new("RGB", (60, 40), "blue")
    picture.paste("red", (0, 0, 60, 10))  # the top, shown at the right after turning
    exif = Image.Exif()
    exif[0x0112] = 6  # turn 90 degrees clockwise
    picture.save(tmp_path / "turned.jpg", exif=exif)
    data, width, height = encode_image(tmp_path / "turned.jpg")
    assert (width, height) == (40, 60)
    with Image.open(io.BytesIO(data)) as upright:
        assert not upright.getexif()
        assert upright.getpixel((36, 30))[0] > 200 and upright.getpixel((5, 30))[2] > 200


@pytest.mark.parametrize("mode", ["L", "P", "LA", "RGBA", "CMYK", "1"])
def test_encode_image_converts_every_mode(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    Image.new("RGBA", (40, 40), (0, 0, 0, 0)).convert(mode).save(path)
    data, *_ = encode_image(path)
    with Image.open(io.BytesIO(data)) as picture:
        assert picture.mode == "RGB"
        if mode in ("RGBA", "LA"):
            assert picture.getpixel((20, 20)) == (255, 255, 255)


def test_encode_image_says_why_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = photo(tmp_path / "whole.jpg", 200, 200).read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.jpg").write_text("not an image")
    (tmp_path / "empty.png").write_bytes(b"")
    photo(tmp_path / "tiny.png", 20, 90)
    Image.fromarray(np.zeros((40, 40), np.uint16)).save(tmp_path / "deep.png")
    reasons = {
        "cut.jpg": "truncated",
        "text.jpg": "cannot be decoded",
        "empty.png": "cannot be decoded",
        "tiny.png": "20 x 90 px: smaller than 32",
        "deep.png": "pixel format",
        "missing.png": "file not found",
    }
    for name, reason in reasons.items():
        with pytest.raises(ValueError) as error:
            encode_image(tmp_path / name)
        assert reason in str(error.value)
    monkeypatch.setattr(pack, "_MAX_PIXELS", 1000)
    with pytest.raises(ValueError) as error:
        encode_image(tmp_path / "whole.jpg")
    assert "megapixels" in str(error.value)


def shop(folder: Path, products: int = 12) -> tuple[Path, Path]:
    """A table of `products` products with a detail and a customer image each, and some rows that cannot be used."""
    images = folder / "photos"
    images.mkdir()
    rows = []
    for p in range(products):
        for source in ("detail", "customer"):
            photo(images / f"{p}-{source}.png")
            rows.append(
                {
                    "product": f"Ref. {p}" if p == 0 else f"ref{p}",
                    "title": f"Chair number {p}, {source}",
                    "category": "Chairs",
                    "image": f"{p}-{source}.png",
                    "source": source,
                    "sku": f"sku{p}",
                    "title_de": f"Stuhl {p}",
                    "attribute_colour": "red",
                }
            )
    good = rows[0]
    rows += [
        {**good, "product": "untitled", "title": ""},
        {**good, "source": "billboard"},
        {**good, "category": "Tables"},
        {**good, "product": "lost", "image": "lost.png"},
        {**good, "product": "outside", "image": "../table.csv"},
    ]
    with (folder / "table.csv").open("w", newline="", encoding="utf-8") as lines:
        writer = csv.DictWriter(lines, list(good))
        writer.writeheader()
        writer.writerows(rows)
    return folder / "table.csv", images


def test_pack_catalog(tmp_path: Path) -> None:
    table, images = shop(tmp_path)
    report = pack_catalog(table, images, tmp_path / "out", workers=2, progress=False)
    assert report.products == {"train": 12} and report.images == 24
    content = members(tmp_path / "out" / "train-000000.tar")
    key = next(name.removesuffix(".json") for name in content if name.endswith(".json"))
    assert key.startswith("Ref-0-") and "." not in key
    sample = Product.from_json(content[f"{key}.json"], where=key)
    assert (sample.product, sample.catalog, sample.title) == ("Ref. 0", "Ref. 0", "Chair number 0, detail")
    assert sample.titles == {"de": "Stuhl 0"} and sample.attributes == {"colour": "red"}
    assert [(i.file, i.source, i.sku, i.title) for i in sample.images] == [
        ("000.jpg", "detail", "sku0", "Chair number 0, detail"),
        ("001.jpg", "customer", "sku0", "Chair number 0, customer"),
    ]
    assert (sample.images[0].width, sample.images[0].height) == (60, 40)
    listed = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    reasons = [r["reason"] for r in listed]
    assert len(reasons) == len(report.rejected) == 7
    assert reasons.count("product without a usable image") == 2
    for part in ("no title", "unknown source", "category differs", "file not found", "outside the image folder"):
        assert sum(part in reason for reason in reasons) == 1, part


def test_pack_catalog_splits_by_catalog_id(tmp_path: Path) -> None:
    photo(tmp_path / "a.png")
    rows = [
        {"product": f"p{i}", "title": "A", "category": "C", "image": ["a.png"], "catalog": f"c{i // 2}"}
        for i in range(60)
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    report = pack_catalog(
        tmp_path / "t.jsonl", tmp_path, tmp_path / "out", val=0.2, test=0.3, workers=1, progress=False
    )
    assert report.products.total() == 60 and min(report.products.values()) >= 4
    sides: dict[str, set[str]] = {}
    for split in ("train", "val", "test"):
        for name, data in members(tmp_path / "out" / f"{split}-000000.tar").items():
            if name.endswith(".json"):
                sides.setdefault(json.loads(data)["catalog"], set()).add(split)
    assert len(sides) == 30 and all(len(s) == 1 for s in sides.values())
    assert not (tmp_path / "out" / "rejected.jsonl").exists()


def test_several_images_in_a_csv_row(tmp_path: Path) -> None:
    photo(tmp_path / "a.png")
    photo(tmp_path / "b.png")
    (tmp_path / "t.tsv").write_text("product\ttitle\tcategory\timage\np\tA\tC\ta.png | b.png\n")
    assert pack_catalog(tmp_path / "t.tsv", tmp_path, tmp_path / "out", progress=False).images == 2


def test_unusable_tables(tmp_path: Path) -> None:
    (tmp_path / "broken.jsonl").write_text('{"product": 1}\n{"product"\n')
    (tmp_path / "empty.csv").write_text("product,title,category,image\n")
    cases = {
        "table.xlsx": "ending in .csv",
        "nowhere.csv": "no such file",
        "broken.jsonl": "line 2",
        "empty.csv": "no product for split 'train'",
    }
    for name, message in cases.items():
        with pytest.raises(ValueError) as error:
            pack_catalog(tmp_path / name, tmp_path, tmp_path / "out", progress=False)
        assert message in str(error.value)
    for settings in ({"val": 0.6, "test": 0.5}, {"short_side": 8}, {"images": tmp_path / "none"}):
        with pytest.raises(ValueError):
            pack_catalog(**{"table": tmp_path / "empty.csv", "images": tmp_path, "data_dir": tmp_path, **settings})


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, images = shop(tmp_path, products=3)
    where = ["--table", str(table), "--images", str(images), "--out", str(tmp_path / "out")]
    pack.main([*where, "--no-progress"])
    printed = capsys.readouterr().out
    assert "train 3; 6 images; 7 rejected" in printed and "1 x file not found" in printed
    with pytest.raises(SystemExit):
        pack.main([*where, "--val", "2"])
    assert "val=2.0" in capsys.readouterr().err
