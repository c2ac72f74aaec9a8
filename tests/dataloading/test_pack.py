"""Packing a user's own table and images: what lands in the shards, and what is rejected."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from eclip.dataloading import pack
from eclip.dataloading.errors import Rejection
from eclip.dataloading.pack import Refused, pack_catalog
from eclip.dataloading.packing.image_folder import Encoded, ImageFolder
from eclip.dataloading.schema import Product
from eclip.dataloading.shards import ShardIndex
from tests.dataloading.shop import content, listed, members, photo, shop, simple, split_keys
from tests.helpers import rank_environment, run_command


def test_pack_catalog(tmp_path: Path) -> None:
    table, images = shop(tmp_path)
    report = pack_catalog(table, images, tmp_path / "out", workers=2, progress=False)
    assert report.products == {"train": 12} and report.images == 24
    found = members(tmp_path / "out" / "train-000000.tar")
    key = next(name.removesuffix(".json") for name in found if name.endswith(".json"))
    assert key.startswith("Ref-0-") and "." not in key
    sample = Product.from_json(found[f"{key}.json"], where=key)
    assert (sample.product, sample.catalog, sample.title) == ("Ref. 0", "Ref. 0", "Chair number 0, detail")
    assert sample.titles == {"de": "Stuhl 0"} and sample.attributes == {"colour": "red"}
    assert [(i.file, i.source, i.sku, i.title) for i in sample.images] == [
        ("000.jpg", "detail", "sku0", "Chair number 0, detail"),
        ("001.jpg", "customer", "sku0", "Chair number 0, customer"),
    ]
    assert (sample.images[0].width, sample.images[0].height) == (60, 40)
    reasons = [r["reason"] for r in listed(tmp_path / "out" / "rejected.jsonl")]
    assert len(reasons) == len(report.rejected) == 7
    assert reasons.count("product without a usable image") == 2
    for part in ("no title", "unknown source", "category differs", "file not found", "outside the image folder"):
        assert sum(part in reason for reason in reasons) == 1, part


def test_the_record_tells_what_was_packed(tmp_path: Path) -> None:
    table = simple(tmp_path)
    pack_catalog(table, tmp_path, tmp_path / "out", val=0.2, short_side=64, progress=False)
    record = json.loads((tmp_path / "out" / "packing.json").read_text())
    assert record["table"] == "t.jsonl" and len(record["table_sha256"]) == 64 and record["images"] == 12
    assert (record["val"], record["test"], record["short_side"]) == (0.2, 0, 64)
    assert sum(record["products"].values()) == 12
    assert record["files"] == {t.name: t.stat().st_size for t in (tmp_path / "out").glob("*.tar")}


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
    (tmp_path / "table.xlsx").write_text("PK")
    (tmp_path / "folder.csv").mkdir()
    cases = {
        "table.xlsx": ".csv",
        "nowhere.csv": "no such",
        "broken.jsonl": "line 2",
        "empty.csv": "no ",
        "folder.csv": "",
    }
    for name, message in cases.items():
        with pytest.raises(ValueError) as error:
            pack_catalog(tmp_path / name, tmp_path, tmp_path / "out", progress=False)
        assert message in str(error.value) and name in str(error.value)
    for settings in ({"val": 0.6, "test": 0.5}, {"short_side": 8}, {"images": tmp_path / "none"}, {"workers": 0}):
        with pytest.raises(ValueError):
            pack_catalog(**{"table": tmp_path / "empty.csv", "images": tmp_path, "data_dir": tmp_path, **settings})


def test_images_that_are_all_absent_are_listed_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Refused before any decode, since the folder is the likely fault; what was looked for is kept all the same."""
    (tmp_path / "t.csv").write_text("product,title,category,image\np,A,C,lost.png\nq,B,C,../away.png\n")
    with pytest.raises(SystemExit) as stop:
        pack.main(["--table", str(tmp_path / "t.csv"), "--images", str(tmp_path), "--out", str(tmp_path / "out")])
    printed = capsys.readouterr()
    assert stop.value.code == 1
    assert "1 x file not found (image; e.g. lost.png)" in printed.out and "--images" in printed.err
    rows = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert [(row["where"], row["reason"]) for row in rows] == [
        ("lost.png", "file not found"),
        ("../away.png", "outside the image folder"),
    ]


def test_packing_again_with_other_shares_leaves_no_product_twice(tmp_path: Path) -> None:
    table, out = simple(tmp_path, 40), tmp_path / "out"
    pack_catalog(table, tmp_path, out, val=0.2, test=0.2, progress=False)
    (out / "photo of mine.jpg").write_text("mine")
    for split in ("train", "val", "test"):
        ShardIndex.open(out, split)  # writes an index beside the tars
    for shares in ({"val": 0.3}, {"test": 0.3}, {}):
        pack_catalog(table, tmp_path, out, **shares, progress=False)
        keys = split_keys(out)
        assert keys.keys() == {"train", *shares} and sum(map(len, keys.values())) == len(set().union(*keys.values()))
        assert {p.name for p in out.glob("*.npz")} <= {f"{split}.index.npz" for split in keys}
        assert ShardIndex.open(out, "train").num_products == len(keys["train"])
    assert (out / "photo of mine.jpg").read_text() == "mine"


@pytest.mark.parametrize("products, shares", [(12, (0.05, 0.05)), (3, (0, 0.01)), (1, (0.1, 0))])
def test_a_split_without_products_is_refused_before_any_image_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, products: int, shares: tuple[float, float]
) -> None:
    table = simple(tmp_path, products)
    monkeypatch.setattr(ImageFolder, "encode", lambda *args: pytest.fail("decoded"))
    with pytest.raises(pack.Refused, match=rf"t\.jsonl: with --.* each of {products} catalog") as error:
        pack_catalog(table, tmp_path, tmp_path / "out", val=shares[0], test=shares[1], progress=False)
    assert [p.name for p in (tmp_path / "out").iterdir()] == [".pack.lock"]
    monkeypatch.undo()
    way_out = str(error.value).split("; ")[-1]
    if found := {flag: float(share) for flag, share in re.findall(r"--(val|test) ([\d.]+)", way_out)}:
        report = pack_catalog(table, tmp_path, tmp_path / "out", **found, progress=False)
        assert report.products.total() == products
    else:
        assert products == 1


def test_when_nothing_is_left_the_reasons_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, out = simple(tmp_path, 5, image="text.png"), tmp_path / "out"
    (tmp_path / "text.png").write_text("not an image")
    command = ["--table", str(table), "--images", str(tmp_path), "--out", str(out), "--no-progress"]
    with pytest.raises(SystemExit) as stop:
        pack.main(command)
    printed = capsys.readouterr()
    assert stop.value.code == 1 and printed.err.count("\n") == 1
    assert "none of its 5 has a usable image" in printed.err and str(out / "rejected.jsonl") in printed.err
    assert re.search(r"5 x not a readable image header \(image; e\.g\. text\.png: ", printed.out)
    assert "5 x product without a usable image (product; e.g. p0)" in printed.out
    assert len(listed(out / "rejected.jsonl")) == 10 and not list(out.glob("*.tar"))

    pack_catalog(simple(tmp_path, 5), tmp_path, out, progress=False)  # mended
    before = content(out)
    assert set(before) == {"train-000000.tar", "packing.json"}
    (tmp_path / "rows.csv").write_text("product,title,category,image\np,,C,a.png\nq,,C,a.png\n")
    with pytest.raises(pack.Refused, match=r"no product left .*2 rejected, with their reasons in .*refused\.jsonl"):
        pack_catalog(tmp_path / "rows.csv", tmp_path, out, progress=False)
    found = content(out)
    assert len(listed(out / "rejected.refused.jsonl")) == 2
    assert before == {name: data for name, data in found.items() if name != "rejected.refused.jsonl"}
    pack_catalog(simple(tmp_path, 5), tmp_path, out, progress=False)
    assert not (out / "rejected.refused.jsonl").exists()


def test_a_split_whose_images_all_fail_keeps_what_was_there(tmp_path: Path) -> None:
    table, out = simple(tmp_path, 30), tmp_path / "out"
    pack_catalog(table, tmp_path, out, val=0.2, progress=False)
    before = content(out)
    lines = table.read_text().splitlines(keepends=True)
    val = split_keys(out)["val"]
    table.write_text("".join(re.sub("a.png", "b.png", s) if json.loads(s)["product"] in val else s for s in lines))
    with pytest.raises(pack.Refused, match="no product left for split val") as error:
        pack_catalog(table, tmp_path, out, val=0.2, progress=False)
    assert len(error.value.report.rejected) == 2 * len(val)
    found = content(out)
    assert len(listed(out / "rejected.refused.jsonl")) == 2 * len(val)
    assert {name: data for name, data in found.items() if name != "rejected.refused.jsonl"} == before


@pytest.mark.parametrize("left", ["nothing", "a mount point"])
def test_a_store_that_goes_away_meanwhile_costs_no_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: str
) -> None:
    table, images = shop(tmp_path, products=6)
    pack_catalog(table, images, tmp_path / "out", progress=False)
    before = content(tmp_path / "out")
    encode = ImageFolder.encode
    names: list[str] = []

    def unmounted(self: ImageFolder, name: str) -> Encoded | Rejection:
        names.append(name)
        if len(names) == 5:
            images.rename(tmp_path / "elsewhere")
            if left == "a mount point":
                images.mkdir()
        return encode(self, name)

    monkeypatch.setattr(ImageFolder, "encode", unmounted)
    with pytest.raises(Refused, match=r"photos is gone, or another folder, .*rejected\.refused\.jsonl"):
        pack_catalog(table, images, tmp_path / "out", workers=1, progress=False)
    (tmp_path / "out" / "rejected.refused.jsonl").unlink()
    assert content(tmp_path / "out") == before


def test_reasons_group_and_kinds_are_counted_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, images = shop(tmp_path, products=3)
    whole = photo(images / "whole.jpg", 200, 200).read_bytes()
    rows = table.read_text().splitlines()
    for cut in range(300, 1300, 100):
        (images / f"cut{cut}.jpg").write_bytes(whole[:cut])
        rows.append(f"cut{cut},A,Chairs,cut{cut}.jpg,detail,,,")
    table.write_text("\n".join(rows) + "\n")
    where = ["--table", str(table), "--images", str(images), "--out", str(tmp_path / "out")]
    pack.main([*where, "--no-progress"])
    printed = capsys.readouterr().out
    assert "train 3; 6 images; 27 rejected (3 rows, 12 images, 12 products)" in printed
    assert "1 x file not found (image; e.g. lost.png)" in printed
    assert re.search(r"10 x truncated \(image; e\.g\. cut300\.jpg: ", printed), printed
    assert [r["where"] for r in listed(tmp_path / "out" / "rejected.jsonl") if r["reason"] == "truncated"] == [
        f"cut{cut}.jpg" for cut in range(300, 1300, 100)
    ]


def test_the_shards_may_lie_among_the_images(tmp_path: Path) -> None:
    table = simple(tmp_path)
    pack_catalog(table, tmp_path, tmp_path, progress=False)
    assert pack_catalog(table, tmp_path, tmp_path, progress=False).products == {"train": 12}
    assert (tmp_path / "a.png").exists() and table.exists()


@pytest.mark.parametrize("locale", [{"LC_ALL": "C", "PYTHONUTF8": "0"}, {"LC_ALL": "C.UTF-8"}])
def test_names_of_all_kinds_whatever_the_locale(tmp_path: Path, locale: dict[str, str]) -> None:
    names = ["Grüße 椅子.png", "latin-1 \udcfc.png", "lost é \u2028 ö.png", "../ö.png", "lost \udcff.png"]
    for name in names[:2]:
        photo(tmp_path / "a.png").rename(os.fsencode(tmp_path).decode() + f"/{name}")
    rows = [
        {"product": f"Stück {i}", "title": "Süß", "category": "Möbel", "image": name} for i, name in enumerate(names)
    ]
    (tmp_path / "täble.jsonl").write_text("\n".join(json.dumps(r, ensure_ascii=True) for r in rows))
    out = tmp_path / "Läden"
    command = [sys.executable, "-m", "eclip.dataloading.pack", "--table", str(tmp_path / "täble.jsonl")]
    command += ["--images", str(tmp_path), "--out", str(out), "--workers", "1"]
    done = subprocess.run([os.fsencode(c) for c in command], env=rank_environment(locale), capture_output=True)
    assert done.returncode == 0 and b"Traceback" not in done.stderr, done
    assert b"products train 2; 2 images; 5 rejected (1 row, 2 images, 2 products)" in done.stdout, done
    found = [r["where"] for r in listed(out / "rejected.jsonl") if r["kind"] == "image"]
    assert found == names[2:4]
    stored = [Product.from_json(v, where=k) for k, v in members(out / "train-000000.tar").items() if k.endswith("json")]
    assert [p.title for p in stored] == ["Süß"] * 2 and stored[0].product == "Stück 0"


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, images = shop(tmp_path, products=3)
    where = ["--table", str(table), "--images", str(images), "--out", str(tmp_path / "out")]
    pack.main([*where, "--no-progress"])
    printed = capsys.readouterr().out
    assert "train 3; 6 images; 7 rejected (3 rows, 2 images, 2 products)" in printed
    assert "1 x file not found" in printed
    with pytest.raises(SystemExit) as stop:
        pack.main(["--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0 and shown.count("--follow-links") >= 2 and "rejected.jsonl" in shown


def test_a_table_and_its_images_are_told_before_any_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    encode = ImageFolder.encode
    monkeypatch.setattr(ImageFolder, "encode", lambda *args: encode(*args) if told else pytest.fail("decoded before"))
    pack_catalog(simple(tmp_path), tmp_path, tmp_path / "out", progress=False, tell=told.append)
    assert told


@pytest.mark.parametrize("module", ["eclip.dataloading.pack", "eclip.dataloading.demo"])
def test_packing_needs_no_torch(module: str) -> None:
    """It takes seconds to import, and the demo's packing starts a process a core."""
    code = f"import sys, {module}; print('torch' in sys.modules)"
    assert run_command([sys.executable, "-c", code]) == "False\n"
