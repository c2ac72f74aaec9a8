"""Words, photos, boxes and both find what a plain comparison of all vectors finds."""

import io
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import eclip
from eclip.search.embed.finish import matrix
from eclip.search.query import Filters, NoSuchImage, Query, Searcher
from eclip.search.query.asking import MARGIN
from tests.dataloading.fixtures import jpeg
from tests.search.conftest import QUOTED, make_index, title_of

PHOTO = jpeg(3, 80, 60)


def stored(searcher: Searcher, column: str) -> tuple[list[str], np.ndarray[Any, Any]]:
    table = searcher.table.scan(["id", column])
    return table["id"].to_pylist(), matrix(table[column])


def ids(searcher: Searcher, **asked: Any) -> list[str]:
    return [hit.id for hit in searcher.search(Query(**asked)).hits]


def best(names: list[str], scores: np.ndarray[Any, Any], count: int) -> list[str]:
    return [names[i] for i in np.argsort(-scores, kind="stable")[:count]]


def test_words_meet_the_sum_of_title_and_instance(searcher: Searcher) -> None:
    names, titles = stored(searcher, "text")
    total = titles + stored(searcher, "instance_title")[1]
    scores = total @ searcher.model.embed_texts("red sofa")[0] / np.linalg.norm(total, axis=1)
    answer = searcher.search(Query(words="red sofa", limit=6, fold=False))
    assert [hit.id for hit in answer.hits] == best(names, scores, 6)
    np.testing.assert_allclose([hit.score for hit in answer.hits], np.sort(scores)[::-1][:6], atol=1e-5)
    assert answer.scored_by == "cosine" and answer.photo_size is None and not answer.photo_regions


def test_a_photo_asks_by_its_own_instance(searcher: Searcher) -> None:
    names, vectors = stored(searcher, "instance_image")
    scores = vectors @ searcher.model.embed_images(PHOTO, instance=True)[0]
    answer = searcher.search(Query(image=PHOTO, limit=5, fold=False))
    assert [hit.id for hit in answer.hits] == best(names, scores, 5)
    assert answer.photo_size == (80, 60)
    assert answer.photo_regions[0].box == searcher.model.locate(PHOTO, PHOTO)[0].box
    hit = answer.hits[0]
    np.testing.assert_allclose(hit.box, searcher.table.find(hit.id, ["box_image"])["box_image"])  # type: ignore[arg-type]


def test_a_box_asks_by_the_square_around_it(searcher: Searcher) -> None:
    names, vectors = stored(searcher, "instance_image")
    cut = (15.0, 5.0, 41.0, 31.0)  # round the middle of the box, 1.3 times its longer side of 20 px
    asked = searcher.model.embed_images(PHOTO, instance=True, boxes=[cut])[0]
    answer = searcher.search(Query(image=PHOTO, box=(23.0, 8.0, 33.0, 28.0), limit=5, fold=False))
    assert [hit.id for hit in answer.hits] == best(names, vectors @ asked, 5)
    for region in answer.photo_regions:
        x0, y0, x1, y1 = region.box
        assert cut[0] - 1e-6 <= x0 < x1 <= cut[2] + 1e-6 and cut[1] - 1e-6 <= y0 < y1 <= cut[3] + 1e-6


def test_words_choose_what_of_a_photo_is_meant(searcher: Searcher) -> None:
    model = searcher.model
    names, titles = stored(searcher, "text")
    total = titles + stored(searcher, "instance_title")[1]
    asked = model.embed_images(PHOTO, ["blue lamp"]) + model.embed_texts("blue lamp")
    answer = searcher.search(Query(image=PHOTO, words="blue lamp", limit=5, fold=False))
    scores = (total @ asked[0]) / np.linalg.norm(total, axis=1)
    assert [hit.id for hit in answer.hits] == best(names, scores, 5)
    assert answer.photo_regions[0].box == model.locate(PHOTO, "blue lamp")[0].box


def test_a_product_is_one_hit_and_as_many_as_asked_remain(searcher: Searcher) -> None:
    products = [hit.product for hit in searcher.search(Query(words="desk", limit=9)).hits]
    assert len(set(products)) == len(products) == 9
    everything = ids(searcher, image=PHOTO, limit=10**9)
    assert len(everything) == 12
    assert len(ids(searcher, image=PHOTO, limit=10**9, fold=False)) == 48


def test_many_at_once_are_each_alone(searcher: Searcher) -> None:
    queries = [
        Query(words="red sofa"),
        Query(image=PHOTO),
        Query(image=PHOTO, words="lamp"),
        Query(words="lamp", hybrid=True),
        Query(image=jpeg(9, 30, 90), box=(0, 0, 20, 20), filters=Filters(category="things")),
    ]
    together = searcher.search_many(queries)
    for query, answer in zip(queries, together, strict=True):
        alone = searcher.search(query)
        assert [hit.id for hit in answer.hits] == [hit.id for hit in alone.hits]
        assert set(alone.seconds) >= {"prepare", "model", "index", "rows"}
    assert searcher.search_many([]) == []


def test_a_photo_may_come_decoded(searcher: Searcher) -> None:
    box = (5.0, 5.0, 30.0, 30.0)
    query = Query(image=PHOTO, box=box)
    read = eclip.inference.read_picture(PHOTO, searcher.model.encoder.image_size, box, margin=MARGIN)
    given = searcher.search(searcher.prepare(query, read))
    assert [hit.id for hit in given.hits] == ids(searcher, image=PHOTO, box=box)


def test_full_text_is_fused(searcher: Searcher) -> None:
    words = 'no 7 "( OR'
    assert searcher.table.full_text(words, 4)[0].product == "p7"
    answer = searcher.search(Query(words=words, hybrid=True, limit=12))
    assert answer.scored_by == "reciprocal rank fusion"
    (seven,) = (hit.score for hit in answer.hits if hit.title == title_of(7))
    first = searcher.search(Query(words=words, limit=12)).hits
    assert seven == pytest.approx(1 / 61 + 1 / (61 + [hit.product for hit in first].index("p7")))


def test_the_head_reorders_the_first_hits(searcher: Searcher) -> None:
    answer = searcher.search(Query(words="green bed", limit=4, rerank=8))
    scores = [hit.score for hit in answer.hits]
    assert scores == sorted(scores, reverse=True) and len(scores) == 4
    first = {hit.product for hit in searcher.search(Query(words="green bed", limit=8)).hits}
    assert {hit.product for hit in answer.hits} <= first


def test_words_are_found_in_the_pictures_shown(searcher: Searcher) -> None:
    answer = searcher.search(Query(words="green bed", limit=3, locate=True))
    for hit in answer.hits:
        (region, *_) = searcher.locate(hit.id, "green bed")
        assert hit.box == region.box
        assert region.box[2] <= hit.width and region.box[3] <= hit.height
    with pytest.raises(NoSuchImage, match="no image \"x' OR 1=1 --\""):
        searcher.locate("x' OR 1=1 --", "bed")
    exemplar = np.asarray(Image.open(io.BytesIO(PHOTO)))
    assert searcher.locate(answer.hits[0].id, exemplar)


def test_words_never_name_a_file(searcher: Searcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bed").write_bytes(PHOTO)
    assert searcher.locate("test/k000/000.jpg", "bed")
    assert ids(searcher, words="bed", image=PHOTO)


def test_filters_hold_and_are_quoted(searcher: Searcher) -> None:
    def found(**filters: Any) -> set[str]:
        return {h.product for h in searcher.search(Query(words="x", limit=99, filters=Filters(**filters))).hits}

    assert found(category=QUOTED) == {"p5", "p11"}
    assert found(attributes={"seats": 5}) == {"p5"} and found(attributes={"folding": True}) == {"p5"}
    assert found(attributes={"colour": "red"}) == {"p0", "p3", "p6", "p9"}
    assert found(attributes={"maker": QUOTED}) == {"p5"}
    assert found(attributes={"maker": QUOTED, "colour": "red"}) == set()
    assert found(price_min=30, price_max=70) == {"p3", "p5", "p6", "p7"}
    assert ids(searcher, words="x", filters=Filters(source="detail"), fold=False, limit=99) == [
        hit.id for hit in searcher.search(Query(words="x", fold=False, limit=99)).hits if hit.source == "detail"
    ]


@pytest.mark.parametrize(
    ("filters", "said"),
    [
        ({"category": "Thing"}, "no category 'Thing' in the catalogue; near it: 'things'"),
        ({"category": "' OR 1=1 --"}, "no category"),
        ({"source": "details"}, "no source 'details' in the catalogue; near it: 'detail'"),
        ({"attributes": {"color": "red"}}, "no attribute 'color' in the catalogue; near it: 'colour'"),
        ({"attributes": {"colour": "Red"}}, "attribute 'colour' is never 'Red' in the catalogue; near it: 'red'"),
        ({"attributes": {"seats": 6}}, "attribute 'seats' is never 6 in the catalogue; there are '2', '5'"),
    ],
)
def test_names_that_are_not_there(searcher: Searcher, filters: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError) as error:
        searcher.search(Query(words="x", filters=Filters(**filters)))
    assert said in str(error.value) and "\n" not in str(error.value)


def test_facets_count_products(searcher: Searcher) -> None:
    facets = searcher.facets()
    assert facets["categories"] == [{"name": "things", "count": 10}, {"name": QUOTED, "count": 2}]
    assert {entry["name"] for entry in facets["sources"]} == {"customer", "detail"}
    assert facets["attributes"]["colour"] == [{"value": c, "count": 4} for c in ("blue", "green", "red")]
    assert facets["price"] == {"min": 10.0, "max": 110.0} and (facets["rows"], facets["products"]) == (48, 12)


def test_without_a_decoder(plain: Searcher) -> None:
    names, vectors = stored(plain, "global")
    answer = plain.search(Query(image=PHOTO, limit=4, fold=False))
    assert [hit.id for hit in answer.hits] == best(names, vectors @ plain.model.embed_images(PHOTO)[0], 4)
    assert answer.hits[0].box is None
    by_words = plain.search(Query(words="red sofa", locate=True))
    assert all(hit.box is not None for hit in by_words.hits)
    assert ids(plain, image=PHOTO, box=(0, 0, 20, 20))
    for asked in ({"image": PHOTO, "words": "sofa"}, {"words": "sofa", "rerank": 10}):
        with pytest.raises(ValueError, match="trained without the instance decoder"):
            plain.search(Query(**asked))


def test_a_narrow_index_is_asked_alike(searcher: Searcher, shop_shards: Path, tmp_path: Path) -> None:
    narrow = Searcher(
        type(searcher.table).open(make_index(searcher.model, shop_shards, tmp_path / "i", dim=16, vectors="float16")),
        searcher.model,
    )
    _, vectors = stored(narrow, "instance_image")
    vector = narrow.table.facts.narrowing(searcher.model.embed_images(PHOTO, instance=True))[0]
    assert vector.shape == (16,)
    found = narrow.search(Query(image=PHOTO, limit=5, fold=False)).hits
    scores = vectors.astype(np.float32) @ vector
    np.testing.assert_allclose([hit.score for hit in found], np.sort(scores)[::-1][:5], atol=2e-3)
    with pytest.raises(ValueError, match="rerank needs whole vectors of"):
        narrow.search(Query(words="sofa", rerank=10))


def test_threads_share_a_searcher(searcher: Searcher) -> None:
    expected = ids(searcher, words="red sofa", image=PHOTO)
    found: list[list[str]] = []
    threads = [
        threading.Thread(target=lambda: found.append(ids(searcher, words="red sofa", image=PHOTO))) for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 6
