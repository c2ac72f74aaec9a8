"""The API over a real index: what it answers, and what becomes of what cannot be answered."""

import asyncio
import base64
import dataclasses
import io
import json
import threading
import time
from typing import Any

import numpy as np
import pytest
from PIL import Image

from eclip.inference import read_picture
from eclip.search.query import Query, UnreadableIndex
from eclip.search.query.asking import MARGIN
from eclip.serve.app import PAGE
from eclip.serve.docs import describe
from eclip.serve.service import Service
from tests.serve.conftest import LIMITS, photo

ID = "test/k000/000.jpg"


def hits(answer: dict[str, Any]) -> list[tuple[str, float]]:
    return [(hit["id"], hit["score"]) for hit in answer["hits"]]


def good(response: Any) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    told: dict[str, Any] = response.json()
    return told


def refused(response: Any, status: int, told: str) -> None:
    assert response.status_code == status, response.text
    assert list(response.json()) == ["error"]
    line = response.json()["error"]
    assert told in line and "\n" not in line and "Traceback" not in line
    assert response.headers["x-content-type-options"] == "nosniff"


def test_words_as_a_form_as_json_and_in_python(client: Any, service: Service) -> None:
    form = good(client.post("/search", files={"words": (None, "red chair"), "limit": (None, "5")}))
    told = good(client.post("/search", json={"words": "red chair", "limit": 5}))
    answer = service.searcher.search(Query(words="red chair", limit=5))
    assert hits(form) == hits(told) == [(hit.id, hit.score) for hit in answer.hits]
    assert told["photo"] is None and told["scored_by"] == "cosine"
    first = told["hits"][0]
    assert client.get(first["thumbnail"]).headers["content-type"] == "image/jpeg"
    assert set(first) == set(document()["/search"]["hits"]["items"]["properties"])
    assert set(told) == set(document()["/search"])


def document() -> dict[str, dict[str, Any]]:
    """Fields of the answers of the POST routes, as the documentation has them."""
    paths = describe(LIMITS)["paths"]
    return {
        path: told["post"]["responses"]["200"]["content"]["application/json"]["schema"]["properties"]
        for path, told in paths.items()
        if "post" in told
    }


@pytest.mark.parametrize("box", [None, (10, 5, 50, 35)])
def test_a_photo_or_a_box_of_it_as_a_file_as_base64_and_in_python(
    client: Any, service: Service, box: tuple[float, float, float, float] | None
) -> None:
    data = photo(90, 60)
    part = {} if box is None else {"box": ",".join(map(str, box))}
    form = good(client.post("/search", data={"limit": "4", **part}, files={"photo": ("../../etc/passwd", data)}))
    body = {"photo": base64.b64encode(data).decode(), "limit": 4, **({} if box is None else {"box": list(box)})}
    told = good(client.post("/search", json=body))
    answer = service.searcher.search(Query(image=data, box=box, limit=4))
    assert hits(form) == hits(told) == [(hit.id, pytest.approx(hit.score, abs=1e-5)) for hit in answer.hits]
    assert (told["photo"]["width"], told["photo"]["height"]) == (90, 60)
    assert told["photo"]["regions"] == [{"box": list(r.box), "score": r.score} for r in answer.photo_regions]


def test_a_hundred_questions_at_once_are_answered_as_each_alone(app: Any, service: Service) -> None:
    import httpx

    words, photos = [f"thing number {i}" for i in range(9)], [photo()]
    alone = [service.searcher.search(Query(words=text, limit=3)) for text in words]
    alone += [service.searcher.search(Query(image=data, limit=3)) for data in photos]
    words, photos, alone = 10 * words, 10 * photos, 10 * alone[:9] + 10 * alone[9:]

    async def ask_all() -> list[Any]:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=60) as client:
            asked = [client.post("/search", json={"words": text, "limit": 3}) for text in words]
            asked += [client.post("/search", data={"limit": "3"}, files={"photo": data}) for data in photos]
            return await asyncio.gather(*asked)

    service.batcher.batches.clear()
    answers = [good(response) for response in asyncio.run(ask_all())]
    assert sum(service.batcher.batches) == 100 and max(service.batcher.batches) > 1
    for told, answer in zip(answers, alone, strict=True):
        # Of a batch the sums have another order: equal scores may change places.
        assert [hit["score"] for hit in told["hits"]] == pytest.approx([h.score for h in answer.hits], abs=1e-5)


def test_filters(client: Any) -> None:
    offered = good(client.get("/facets"))
    assert offered["rows"] == 36 and offered["products"] == 9
    name = offered["categories"][0]["name"]
    found = good(client.post("/search", json={"words": "x", "category": name, "limit": 100}))
    assert {hit["category"] for hit in found["hits"]} == {name}
    source = offered["sources"][0]["name"]
    found = good(client.post("/search", json={"words": "x", "source": source, "limit": 100, "fold": False}))
    assert {hit["source"] for hit in found["hits"]} == {source}
    unknown = client.post("/search", json={"words": "x", "category": "nowhere"})
    refused(unknown, 422, "'nowhere'")


def test_words_are_looked_for_in_few_pictures(client: Any) -> None:
    refused(client.post("/search", json={"words": "x", "locate": True, "limit": 21}), 422, "at most 20 pictures")


def test_locate(client: Any, service: Service) -> None:
    told = good(client.post("/locate", json={"id": ID, "words": "red"}))
    regions = service.searcher.locate(ID, "red")
    assert told["regions"] == [{"box": list(r.box), "score": pytest.approx(r.score)} for r in regions]
    assert np.asarray(told["map"]).shape == (told["grid"], told["grid"])
    assert np.min(told["map"]) == 0 and np.max(told["map"]) == 1
    assert set(told) == set(document()["/locate"])
    data = photo(90, 60)
    mine = good(client.post("/locate", data={"words": "red"}, files={"photo": data}))
    expected = service.model.locate(data, "red")
    assert (mine["width"], mine["height"]) == (90, 60)
    assert [region["box"] for region in mine["regions"]] == [pytest.approx(r.box) for r in expected]
    like = good(client.post("/locate", data={"id": ID, "box": "0,0,20,20"}, files={"exemplar": data}))
    assert like["regions"]


def test_embed(client: Any, service: Service) -> None:
    texts = good(client.post("/embed", json={"texts": ["red chair", "lamp"]}))
    assert np.allclose(texts["vectors"], service.model.embed_texts(["red chair", "lamp"]), atol=1e-5)
    assert texts["embed_dim"] == service.model.embed_dim
    files = [("photos", photo(seed=i)) for i in range(2)]
    images = [data for _, data in files]
    whole = good(client.post("/embed", files=files))
    assert np.allclose(whole["vectors"], service.model.embed_images(images), atol=1e-5)
    named = good(client.post("/embed", files=files, data={"prompts": ["red", "blue"]}))
    assert np.allclose(named["vectors"], service.model.embed_images(images, ["red", "blue"]), atol=1e-5)


BAD: list[tuple[str, dict[str, Any], int, str]] = [
    ("/search", {}, 422, "nothing is asked"),
    ("/search", {"words": " "}, 422, "nothing is asked"),
    ("/search", {"words": ["a", "b"]}, 422, "given 2 times"),
    ("/search", {"words": 3}, 422, "text is wanted, not a number"),
    ("/search", {"words": "x" * 1001}, 422, "1001 characters are more than 1000"),
    ("/search", {"words": "\ud800"}, 422, "not valid Unicode"),
    ("/search", {"words": "x", "limt": 3}, 422, "'limt': no such field"),
    ("/search", {"words": "x", "limit": 0}, 422, "limit=0: a whole number from 1 to 100"),
    ("/search", {"words": "x", "limit": 1e999}, 400, "no JSON"),
    ("/search", {"words": "x", "limit": True}, 422, "limit=True: a number is wanted"),
    ("/search", {"words": "x", "hybrid": "perhaps"}, 422, "true or false"),
    ("/search", {"words": "x", "price_min": "cheap"}, 422, "price_min='cheap': a number"),
    ("/search", {"words": "x", "price_min": 3, "price_max": 2}, 422, "no price lies there"),
    ("/search", {"words": "x", "attribute": "red"}, 422, "name=value"),
    ("/search", {"words": "x", "attribute": ["a=b", "a=c"]}, 422, "given twice"),
    ("/search", {"words": "x", "box": "1,2,3,4"}, 422, "without a photo"),
    ("/search", {"photo": "/etc/passwd"}, 422, "paths are never opened"),
    ("/search", {"photo": {"path": "/etc/passwd"}}, 422, "paths are never opened"),
    ("/search", {"photo": "bm8gaW1hZ2U="}, 422, "not a readable image header"),
    ("/locate", {"words": "x"}, 422, "where to look"),
    ("/locate", {"id": ID}, 422, "what to look for"),
    ("/locate", {"id": "nobody", "words": "x"}, 404, "no image 'nobody'"),
    ("/locate", {"id": "' OR true --", "words": "x"}, 404, "no image"),
    ("/embed", {}, 422, "nothing to embed"),
    ("/embed", {"texts": ["a", ""]}, 422, "texts[1] is empty"),
    ("/embed", {"texts": ["a"] * 5}, 413, "5 texts: at most 4"),
    ("/embed", {"photos": ["QQ=="] * 4}, 413, "4 photos: at most 3"),
]


@pytest.mark.parametrize("path, body, status, told", BAD)
def test_what_cannot_be_answered_is_said_in_one_line(
    client: Any, path: str, body: dict[str, Any], status: int, told: str
) -> None:
    refused(client.post(path, content=json.dumps(body), headers={"content-type": "application/json"}), status, told)


def test_photos_that_cannot_be_taken(client: Any) -> None:
    def ask(data: bytes, **fields: str) -> Any:
        return client.post("/search", files={"photo": data}, data=fields)

    refused(ask(photo(500, 300)[:3000]), 422, "truncated")
    refused(ask(photo(), box="100,100,120,120"), 422, "lies in the image of 60 x 40 px")
    refused(ask(photo(), box="1,2,3"), 422, "four numbers")
    refused(ask(photo(), box="1,2,nan,4"), 422, "four numbers")
    black = io.BytesIO()
    Image.new("1", (1100, 1000)).save(black, "PNG")
    refused(ask(black.getvalue()), 413, "1100 x 1000 px are more than 1 megapixels")
    refused(ask(b"x" * 400_000), 413, "larger than 0.3 MB")
    refused(client.post("/search", files=[("photo", photo()), ("photo", photo())]), 422, "given 2 times")
    refused(client.post("/search", files=[("photo", b"x")] * 4), 400, "Too many files")
    refused(client.post("/search", data={"words": "x" * 70_000}, files={"photo": photo()}), 400, "maximum size of 64KB")


def test_bodies_of_another_kind(client: Any) -> None:
    refused(client.post("/search", data={"words": "x"}), 415, "'application/x-www-form-urlencoded'")
    refused(client.post("/search"), 415, "content type ''")
    for body, status in ((b"{", 400), (b"[" * 100_000, 400), (b"\xff", 400), (b"[]", 422), (b'{"limit": NaN}', 400)):
        assert client.post("/search", content=body, headers={"content-type": "application/json"}).status_code == status
    for kind in ("multipart/form-data", "multipart/form-data; boundary=b"):
        broken = client.post("/search", content=b"--b\r\n: nonsense\r\n\r\n--b--", headers={"content-type": kind})
        refused(broken, 400, "")


def test_a_text_that_names_a_file_is_a_text(client: Any) -> None:
    for path, body in (("/search", {}), ("/locate", {"id": ID})):
        good(client.post(path, json={"words": "/etc/passwd", **body}))


def test_other_pages(client: Any) -> None:
    assert good(client.get("/healthz"))["status"] == "ok"
    assert client.head("/healthz").status_code == client.head("/").status_code == 200
    refused(client.get("/nowhere"), 404, "no such page")
    refused(client.get("/search"), 405, "method")
    refused(client.get("/thumbnails/../../etc/passwd"), 404, "")
    refused(client.get("/thumbnails/%2e%2e/x"), 404, "no image '../x'")
    refused(client.get("/static/%2e%2e/app.py"), 404, "no such page")
    refused(client.get("/healthz", headers={"host": "evil.example"}), 400, "not served here")
    assert client.get("/").text == (PAGE / "index.html").read_text(encoding="utf-8")


def test_the_documentation_needs_no_network(client: Any) -> None:
    page = client.get("/docs").text
    assert "<script" not in page and "http:" not in page and "https:" not in page
    paths = good(client.get("/openapi.json"))["paths"]
    assert set(paths) == {"/search", "/locate", "/embed", "/healthz", "/facets", "/thumbnails/{id}"}
    assert all(f"<code>POST {path}</code>" in page for path in ("/search", "/locate", "/embed"))
    for path in ("/healthz", "/facets"):
        told = paths[path]["get"]["responses"]["200"]["content"]["application/json"]["schema"]["properties"]
        assert set(good(client.get(path))) == set(told)


def test_a_request_that_takes_too_long_is_given_up(
    client: Any, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()
    blocked = service.batcher.call(lambda: release.wait(20))
    monkeypatch.setattr(service, "limits", dataclasses.replace(LIMITS, seconds=0.1))
    refused(client.post("/search", json={"words": "x"}), 504, "no answer within 0.1 s")
    release.set()
    assert blocked.result(20)
    monkeypatch.undo()
    good(client.post("/search", json={"words": "x"}))


def test_all_steps_of_a_request_have_one_limit(
    client: Any, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = service.decoders.decode

    def slow(*given: Any, **more: Any) -> Any:
        time.sleep(0.15)
        return decode(*given, **more)

    monkeypatch.setattr(service.decoders, "decode", slow)
    monkeypatch.setattr(service, "limits", dataclasses.replace(LIMITS, seconds=0.3))
    photos = [("photos", photo(20, 20))] * 3
    refused(client.post("/embed", files=photos), 504, "no answer within 0.3 s")


def test_a_damaged_index_is_the_servers_fault(
    client: Any, service: Service, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def gone(*_: Any) -> None:
        raise UnreadableIndex("/srv/index: the index cannot be read (gone)")

    monkeypatch.setattr(service.searcher, "prepare", gone)
    monkeypatch.setattr(service.searcher, "row", gone)
    for answer in (client.post("/search", json={"words": "x"}), client.get(f"/thumbnails/{ID}")):
        refused(answer, 500, "an error of the server's")
        assert "/srv" not in answer.text and "/srv/index" in caplog.text


def test_the_pixels_of_a_box_have_the_searchers_margin(service: Service) -> None:
    data, box = photo(90, 60), (10.0, 5.0, 50.0, 35.0)
    decoded = service.decoders.decode(data, box, margin=MARGIN).result(20)
    assert decoded.square.equal(read_picture(data, service.model.encoder.image_size, box, margin=MARGIN).square)
