"""An index that is none, damaged, empty or another model's is refused in a line; one of many rows finds enough."""

import io
import json
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image

from eclip.dataloading.packing import write_shards
from eclip.inference import TrainedModel
from eclip.search.query import Filters, Query, Searcher
from eclip.search.query.table import ImageTable, UnreadableIndex
from tests.search.conftest import make_index, product

lancedb = pytest.importorskip("lancedb")


def refused(index: Path | str) -> str:
    with pytest.raises(ValueError) as error:
        ImageTable.open(index)
    message = str(error.value)
    assert "\n" not in message and str(index) in message
    return message


def test_no_index(tmp_path: Path) -> None:
    assert "no such folder" in refused(tmp_path / "typo")
    assert not (tmp_path / "typo").exists()
    assert "no index here" in refused(tmp_path)
    (tmp_path / "file").write_text("x")
    assert "no such folder" in refused(tmp_path / "file")


def test_a_table_of_others(tmp_path: Path) -> None:
    lancedb.connect(str(tmp_path)).create_table("images", [{"id": "x"}])
    assert "none that eclip embed wrote" in refused(tmp_path)


def test_a_later_format_and_an_empty_one(tmp_path: Path, shop: Path) -> None:
    schema = lancedb.connect(str(shop)).open_table("images").schema
    told = json.loads(schema.metadata[b"eclip"])
    for name, record in (("later", {**told, "format": 99}), ("short", {"format": 1}), ("empty", told)):
        changed = schema.with_metadata({b"eclip": json.dumps(record).encode()})
        lancedb.connect(str(tmp_path / name)).create_table("images", schema=changed)
    assert "format 99" in refused(tmp_path / "later")
    assert "record is not complete" in refused(tmp_path / "short")
    assert "is empty" in refused(tmp_path / "empty")


def test_a_damaged_table(tmp_path: Path, shop: Path, eclip_model: TrainedModel) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(shop, copy)
    for file in (copy / "images.lance" / "data").iterdir():
        file.write_bytes(b"damaged" * 30)
    with pytest.raises(ValueError, match="the index cannot be read") as error:
        Searcher(ImageTable.open(copy), eclip_model).search(Query(words="sofa"))
    assert "\n" not in str(error.value)
    for file in (copy / "images.lance" / "_versions").iterdir():
        file.write_bytes(b"")
    assert "cannot be read" in refused(copy) or "no index here" in refused(copy)


def test_an_index_that_was_replaced_is_opened_anew(
    eclip_model: TrainedModel, plain: Searcher, shop_shards: Path, tmp_path: Path
) -> None:
    """As a server has it that runs on while eclip embed --overwrite makes a new one."""
    out = make_index(eclip_model, shop_shards, tmp_path / "index")
    searcher = Searcher(ImageTable.open(out), eclip_model)
    query = Query(words="red sofa", fold=False)
    before = [hit.id for hit in searcher.search(query).hits]
    make_index(eclip_model, shop_shards, out, overwrite=True, thumbnail=32)
    assert Image.open(io.BytesIO(searcher.thumbnail("test/k000/000.jpg"))).width == 32
    assert [hit.id for hit in searcher.search(query).hits] == before and searcher.facets()["rows"] == 48
    make_index(plain.model, shop_shards, out, overwrite=True)
    with pytest.raises(UnreadableIndex, match="opened anew: .* not the model that made") as error:
        searcher.search(query)
    assert "\n" not in str(error.value)


def test_another_model(trained: Path, shop: Path, plain: Searcher) -> None:
    with pytest.raises(ValueError, match="not the model that made"):
        Searcher.open(shop, plain.model.source)


def test_a_model_that_moved(trained: Path, shop: Path, tmp_path: Path) -> None:
    rows = lancedb.connect(str(shop)).open_table("images").to_arrow()
    told = {**json.loads(rows.schema.metadata[b"eclip"]), "model": str(tmp_path / "gone")}
    changed = rows.replace_schema_metadata({b"eclip": json.dumps(told).encode()})
    lancedb.connect(str(tmp_path / "index")).create_table("images", changed)
    with pytest.raises(ValueError, match="gone: no such folder.* say where it is with --model"):
        Searcher.open(tmp_path / "index")
    moved = Searcher.open(tmp_path / "index", trained)
    assert moved.search(Query(words="sofa")).hits
    with pytest.raises(ValueError, match="hybrid asks a full-text index"):
        moved.search(Query(words="sofa", hybrid=True))


def test_lancedb_is_missing(monkeypatch: pytest.MonkeyPatch, shop: Path) -> None:
    monkeypatch.setitem(sys.modules, "lancedb", None)
    with pytest.raises(ValueError, match=r'pip install -e ".\[serve\]"'):
        ImageTable.open(shop)


def test_an_ivf_index_finds_the_few_that_a_filter_leaves(eclip_model: TrainedModel, tmp_path: Path) -> None:
    write_shards([product(number, images=8) for number in range(34)], tmp_path / "shards", "test")
    index = make_index(eclip_model, tmp_path / "shards", tmp_path / "index", index="ivf_pq", facets=("maker",))
    searcher = Searcher.open(index)
    assert searcher.table.facts.index.kind == "ivf_pq"
    few = Query(words="sofa", filters=Filters(attributes={"maker": product(5)[0].attributes["maker"]}), fold=False)
    assert len(searcher.search(few).hits) == 8
    vector = searcher.model.embed_texts("sofa")[0]
    for where in (None, "product = 'p3'"):
        exact = searcher.table.nearest(vector, "text", 16, where, exact=True)
        found = searcher.table.nearest(vector, "text", 16, where)
        assert [c.score for c in found] == pytest.approx([c.score for c in exact], abs=1e-5)
    assert len(searcher.search(Query(words="sofa", limit=10**6)).hits) == 34
