"""What an index holds, and what becomes of one that is there."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from eclip.config import RunConfig
from eclip.dataloading.shards import ShardIndex
from eclip.evaluate.extraction import extract_features
from eclip.inference import TrainedModel
from eclip.search.embed import Narrowing, Report, ShardCatalogue, TableCatalogue, embed_catalogue, record_of
from eclip.search.embed.store import WORK, Place, connect
from tests.dataloading.fixtures import jpeg, make_split
from tests.dataloading.shop import shop
from tests.search.embed.conftest import DAMAGED, quiet


def rows(out: Path) -> list[dict[str, Any]]:
    table = Place(str(out)).open()
    assert table is not None
    found: list[dict[str, Any]] = table.to_arrow().to_pylist()
    return found


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file."""
    facts = {str(path.relative_to(folder)): path.stat() for path in folder.rglob("*") if path.is_file()}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in facts.items()}


def test_every_image_is_there_once_with_its_facts(made: tuple[Path, Report], shards: Path) -> None:
    out, report = made
    found = {row["id"]: row for row in rows(out)}
    wanted = []
    for split in ("train", "test"):
        index = ShardIndex.open(shards, split)
        wanted += [f"{split}/{index.image_key(row)}" for row in range(index.num_images)]
    assert [row["id"] for row in rows(out)] == [name for name in wanted if name != DAMAGED]
    row = found["test/k002/004.jpg"]
    assert (row["product"], row["title"], row["category"]) == ("p2", "Title 2 of kind 0", "cat2")
    assert (row["source"], row["width"], row["height"]) == ("customer", 48, 200)
    assert row["image"] == f"{shards.resolve()}/test-000001.tar/k002.004.jpg"
    for row in found.values():
        for name in ("box_image", "box_title"):
            x0, y0, x1, y1 = row[name]
            assert 0 <= x0 < x1 <= row["width"] and 0 <= y0 < y1 <= row["height"]
        with Image.open(io.BytesIO(row["thumbnail"])) as thumbnail:
            assert thumbnail.format == "JPEG" and max(thumbnail.size) == min(256, max(row["width"], row["height"]))
    assert not (out / WORK).exists()
    assert [(name, "header" in reason or "cannot" in reason) for name, reason in report.rejected] == [(DAMAGED, True)]


def test_the_vectors_are_those_of_evaluation(
    made: tuple[Path, Report], shards: Path, run_dir: Path, model: TrainedModel
) -> None:
    index, encoder = ShardIndex.open(shards, "test"), model.encoder
    config = RunConfig.from_json((run_dir / "config.json").read_text())
    every = np.arange(index.num_images)
    features, corrupt = extract_features(
        encoder.model, index, encoder.tokenizer, config, every, device=torch.device("cpu"), progress=False
    )
    assert len(corrupt) == 1
    found = [row for row in rows(made[0]) if row["id"].startswith("test/")]
    for column, wanted in (
        ("global", features.global_image),
        ("text", features.text),
        ("instance_image", features.instance_image),
        ("instance_title", features.instance_text),
    ):
        assert wanted is not None
        np.testing.assert_allclose([row[column] for row in found], wanted.numpy(), atol=2e-6, err_msg=column)


def test_the_record_tells_what_it_was_made_of(made: tuple[Path, Report], model: TrainedModel) -> None:
    record = made[1].record
    table = Place(str(made[0])).open()
    assert record_of(table.schema) == record
    told = {"format": 1, "fingerprint": model.encoder.fingerprint, "embed_dim": 32, "dim": 32, "has_decoder": True,
            "rows": 131, "products": 4, "rejected": 1, "vectors": "float32", "image_size": 32}  # fmt: skip
    assert {name: record[name] for name in told} == told
    assert {column for found in table.list_indices() for column in found.columns} == {
        "id", "product", "title", "category", "facets", "price",
    }  # fmt: skip


def test_titles_are_found_by_words_in_any_spelling(made: tuple[Path, Report]) -> None:
    table = Place(str(made[0])).open()
    found = table.search("TÍTLE 2 kind", query_type="fts").limit(5).to_arrow()["title"].to_pylist()
    assert len(found) == 5 and all(title.startswith("Title 2") for title in found)


def test_a_complete_index_is_left_alone(made: tuple[Path, Report], model: TrainedModel, shards: Path) -> None:
    before = contents(made[0])
    report = embed_catalogue(model, ShardCatalogue(shards), quiet(made[0]))
    assert report is not None and not report.new and report.record == made[1].record
    with pytest.raises(ValueError, match="holds an index of 131 images .* --overwrite, which replaces it when the new"):
        embed_catalogue(model, ShardCatalogue(shards, ["test"]), quiet(made[0]))
    with pytest.raises(ValueError, match="holds an index"):
        embed_catalogue(model, ShardCatalogue(shards), quiet(made[0], dim=8))
    assert {name: facts for name, facts in contents(made[0]).items() if not name.startswith(f"{WORK}/")} == before


def test_an_index_is_replaced_when_the_new_one_is_complete(
    model: TrainedModel, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "index"
    embed_catalogue(model, ShardCatalogue(shards, ["test"]), quiet(out))
    with monkeypatch.context() as patch:
        patch.setattr("eclip.search.embed.indexes.build", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            embed_catalogue(model, ShardCatalogue(shards, ["train"]), quiet(out, overwrite=True))
    assert {row["id"].split("/")[0] for row in rows(out)} == {"test"}
    narrow = quiet(out, overwrite=True, dim=8, vectors="float16", facets=())
    report = embed_catalogue(model, ShardCatalogue(shards, ["train"]), narrow)
    assert report is not None and report.embedded == 0  # the parts of the start that failed
    found = rows(out)
    assert {row["id"].split("/")[0] for row in found} == {"train"} and len(found) == 80
    table = Place(str(out)).open()
    full = model.embed_images(next(iter(ShardCatalogue(shards, ["train"]).listings(5, 6))).read())
    query = Narrowing.of_index(report.record, table.schema.metadata)(full)
    hit = table.search(query[0], vector_column_name="global").distance_type("cosine").limit(1).to_list()[0]
    assert hit["id"] == "train/k000/005.jpg" and hit["_distance"] < 1e-3 and len(hit["global"]) == 8


def test_work_of_another_making_is_not_continued(model: TrainedModel, shards: Path, tmp_path: Path) -> None:
    kept = tmp_path / "parts"
    embed_catalogue(model, ShardCatalogue(shards, ["test"]), quiet(tmp_path / "a", parquet=kept))
    again = embed_catalogue(model, ShardCatalogue(shards, ["test"]), quiet(tmp_path / "b", parquet=kept))
    assert again is not None and again.embedded == 0 and rows(tmp_path / "a") == rows(tmp_path / "b")
    with pytest.raises(ValueError, match="of another making .its data: .*test.*, now .*train.*--overwrite to start af"):
        embed_catalogue(model, ShardCatalogue(shards, ["train"]), quiet(tmp_path / "c", parquet=kept))
    torn = next(kept.glob("part-*.parquet"))
    torn.write_bytes(torn.read_bytes()[:-100])
    again = embed_catalogue(model, ShardCatalogue(shards, ["test"]), quiet(tmp_path / "d", parquet=kept))
    assert again is not None and again.embedded == 52 and rows(tmp_path / "d") == rows(tmp_path / "a")


def test_a_database_with_an_address_takes_an_index(model: TrainedModel, shards: Path, tmp_path: Path) -> None:
    address, kept = f"file://{tmp_path}/bucket/index", tmp_path / "parts"
    with pytest.raises(ValueError, match="an address holds no unfinished work; name a folder for it: --parquet DIR"):
        embed_catalogue(model, ShardCatalogue(shards, ["test"]), quiet(address))
    made = [embed_catalogue(model, ShardCatalogue(shards, ["test"]), quiet(address, parquet=kept)) for _ in range(2)]
    assert [report is not None and report.new for report in made] == [True, False]
    assert connect(address).open_table("images").count_rows() == 51
    assert not list(Path().glob("file:*"))


def test_a_table_and_its_folder_need_no_packing(model: TrainedModel, tmp_path: Path) -> None:
    table, images = shop(tmp_path, products=3)
    catalogue = TableCatalogue(table, images)
    report = embed_catalogue(model, catalogue, quiet(tmp_path / "index"))
    assert report is not None and catalogue.rejected
    found = {row["id"]: row for row in rows(tmp_path / "index")}
    row = found["ref1/1-customer.png"]
    assert (row["product"], row["title"], row["source"]) == ("ref1", "Chair number 1, customer", "customer")
    assert row["image"] == str(images.resolve() / "1-customer.png") and (row["width"], row["height"]) == (60, 40)
    assert json.loads(row["attributes"])["colour"] == "red"
    assert len(found) == 6 and {name for name, _ in report.rejected} == {"lost/lost.png", "outside/../table.csv"}


@pytest.mark.parametrize("dim", [None, 8])
def test_a_part_without_a_readable_image(model: TrainedModel, tmp_path: Path, dim: int | None) -> None:
    """Of 65 images the last is a part of its own."""
    make_split(
        tmp_path, "test", products=1, images=65, image=lambda _, i: b"\xff\xd8\xff x" if i == 64 else jpeg(i, 48, 48)
    )
    report = embed_catalogue(model, ShardCatalogue(tmp_path), quiet(tmp_path / "index", dim=dim))
    assert report is not None and (report.record["rows"], len(report.rejected)) == (64, 1)
    assert len(rows(tmp_path / "index")) == 64


def test_a_photo_that_was_replaced_is_another_catalogue(model: TrainedModel, tmp_path: Path) -> None:
    table, images = shop(tmp_path, products=2)
    out, kept = tmp_path / "index", tmp_path / "kept"
    embed_catalogue(model, TableCatalogue(table, images), quiet(out, parquet=kept))
    Image.new("RGB", (64, 64), "red").save(images / "1-detail.png")
    with pytest.raises(ValueError, match="--overwrite, which replaces it"):
        embed_catalogue(model, TableCatalogue(table, images), quiet(out, parquet=kept))
    embed_catalogue(model, TableCatalogue(table, images), quiet(out, parquet=kept, overwrite=True))
    (row,) = (row for row in rows(out) if row["id"].endswith("1-detail.png"))
    assert (row["width"], row["height"]) == (64, 64)


def test_ids_can_stand_in_an_address(tmp_path: Path) -> None:
    _, images = shop(tmp_path, products=1)
    table = tmp_path / "found.csv"
    table.write_text("product,title,category,image\na,Red,x,./0-detail.png\nb,Blue,x,y/../0-detail.png\n")
    assert [one.id for one in TableCatalogue(table, images).listings(0, 9)] == ["a/0-detail.png", "b/0-detail.png"]


def test_folders_of_others_are_left_as_they_are(model: TrainedModel, shards: Path, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "mine").write_text("mine")
    embed_catalogue(model, ShardCatalogue(shards, ["test"]), quiet(tmp_path))
    assert (tmp_path / "work" / "mine").read_text() == "mine" and not (tmp_path / WORK).exists()
    for name, text in (("part-00000.parquet", "theirs"), ("manifest.json", "{\"files\": 3}")):
        folder = tmp_path / name.split(".")[0]
        folder.mkdir()
        (folder / name).write_text(text)
        changes = {"parquet": folder, "overwrite": True}
        with pytest.raises(ValueError, match=f"{name}: no embedding wrote this"):
            embed_catalogue(model, ShardCatalogue(shards, ["test"]), quiet(tmp_path / "other", **changes))
        assert (folder / name).read_text() == text


def test_an_image_listed_twice_has_two_ids(tmp_path: Path) -> None:
    table, images = shop(tmp_path, products=1)
    table = tmp_path / "twice.csv"
    table.write_text("product,title,category,image,sku\na,Red,x,0-detail.png,r\na,Blue,x,0-detail.png,b\n")
    catalogue = TableCatalogue(table, images)
    assert [one.id for one in catalogue.listings(0, 9)] == ["a/0-detail.png", "a/0-detail.png#2"]
    assert TableCatalogue(table, images).fingerprint == catalogue.fingerprint


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"dim": 33}, "--dim 33: the model has 32 numbers in a vector; take 1 to 32"),
        ({"thumbnail": 3}, "--thumbnail 3: expected 32 to 4096"),
        ({"facets": ("colour",)}, "--facets colour: no product has it; the catalogue has no attribute"),
        ({"index": "ivf_pq"}, "--index ivf_pq: 51 rows"),
    ],
)
def test_settings_that_cannot_be_are_told(
    model: TrainedModel, shards: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        embed_catalogue(model, ShardCatalogue(shards, ["test"]), quiet(tmp_path / "index", **changes))
    assert Place(str(tmp_path / "index")).record() is None


def test_what_is_not_ours_is_not_touched(model: TrainedModel, shards: Path, tmp_path: Path) -> None:
    connect(str(tmp_path / "theirs")).create_table("images", data=[{"a": 1}])
    (tmp_path / "file").write_text("mine")
    for out, words in (("theirs", "its table 'images' is no index of eclip embed"), ("file", "a file; choose a fol")):
        with pytest.raises(ValueError, match=words):
            embed_catalogue(model, ShardCatalogue(shards, ["test"]), quiet(tmp_path / out, overwrite=True))
    with pytest.raises(ValueError, match=r"--split tset: .* holds train, test; take one of these"):
        ShardCatalogue(shards, ["tset"])
    assert connect(str(tmp_path / "theirs")).open_table("images").to_arrow().to_pylist() == [{"a": 1}]


def test_a_damaged_shard_is_named(model: TrainedModel, shards: Path, tmp_path: Path) -> None:
    copy = tmp_path / "shards"
    copy.mkdir()
    for path in shards.glob("test*"):
        (copy / path.name).write_bytes(path.read_bytes())
    catalogue = ShardCatalogue(copy)
    (copy / "test-000001.tar").write_bytes(b"")
    with pytest.raises(ValueError, match=r"test-000001\.tar"):
        embed_catalogue(model, catalogue, quiet(tmp_path / "index"))
