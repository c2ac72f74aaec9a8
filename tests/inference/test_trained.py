"""What a user asks of a trained model: shapes, units, prompts of both kinds, and one line for what is wrong."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from eclip.inference import Encoder, TrainedModel


def photos(count: int, side: int = 40) -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    return [rng.integers(0, 255, (side + i, side + 2 * i, 3), dtype=np.uint8) for i in range(count)]


def assert_unit(vectors: np.ndarray, rows: int, model: TrainedModel) -> None:
    assert vectors.shape == (rows, model.embed_dim) and vectors.dtype == np.float32
    np.testing.assert_allclose((vectors**2).sum(1), 1, rtol=1e-5)


def test_embeddings_have_unit_length_whatever_the_batch(model: TrainedModel) -> None:
    pictures, titles = photos(5), [f"red sofa {i}" for i in range(5)]
    assert_unit(model.embed_texts(titles), 5, model)
    ways: list[dict[str, Any]] = [{}, {"instance": True}, {"prompts": titles}, {"prompts": photos(5, 50)}]
    found = [model.embed_images(pictures, **way) for way in ways]
    for way, vectors in zip(ways, found, strict=True):
        assert_unit(vectors, 5, model)
        np.testing.assert_allclose(model.embed_images(pictures, **way, batch_size=2), vectors, atol=1e-5)
    assert all(not np.allclose(a, b, atol=1e-3) for i, a in enumerate(found) for b in found[:i])


def test_one_alone_is_a_row(model: TrainedModel) -> None:
    picture = photos(1)[0]
    assert_unit(model.embed_texts("a lamp"), 1, model)
    assert_unit(model.embed_images(picture), 1, model)
    assert_unit(model.embed_images(picture, "a lamp"), 1, model)
    assert_unit(model.embed_images(np.stack([picture, picture])), 2, model)  # an array of images


def test_long_texts_and_titles_like_file_names(
    model: TrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A text longer than a file's name may be is no OSError, and a title is a title."""
    picture = photos(1)[0]
    for text in ("x" * 300, "\u6c99\u53d1" * 80, "a\0b"):
        assert model.locate(picture, text)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Makefile").touch()
    assert_unit(model.embed_products([picture], ["Makefile"]), 1, model)


def test_many_are_any_iterable(model: TrainedModel, tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for path, picture in zip(paths, photos(3), strict=True):
        Image.fromarray(picture).save(path)
    expected = model.embed_products(paths, ["sofa", "lamp", "bed"])
    column = np.array([str(path) for path in paths])
    ways: list[Any] = [tuple(paths), iter(paths), column, column.astype(object), [path.open("rb") for path in paths]]
    for way in ways:
        np.testing.assert_allclose(model.embed_products(way, iter(["sofa", "lamp", "bed"])), expected, atol=1e-6)


def test_a_box_is_the_image_that_is_looked_at(model: TrainedModel) -> None:
    picture = photos(1, 60)[0]
    cut = model.embed_images([picture], boxes=[(10, 20, 50, 60)])
    # Not the very same: the filter sees a pixel beyond the box, which the cut image has not.
    np.testing.assert_allclose(cut, model.embed_images(picture[20:60, 10:50]), atol=5e-3)
    assert not np.allclose(cut, model.embed_images(picture), atol=5e-3)
    whole = model.embed_images([picture], boxes=[None])
    np.testing.assert_allclose(whole, model.embed_images(picture), atol=1e-6)


def test_products_of_image_and_title(model: TrainedModel) -> None:
    pictures, titles = photos(3), ["red sofa", "blue lamp", "green bed"]
    visual, texts = model.embed_products(pictures, titles), model.embed_texts(titles)
    np.testing.assert_allclose(visual, model.embed_images(pictures, titles), atol=1e-6)
    for kind, image in (("instance+text", visual), ("global+text", model.embed_images(pictures))):
        both = model.embed_products(pictures, titles, kind=kind)  # type: ignore[arg-type]
        assert_unit(both, 3, model)
        summed = image + texts
        np.testing.assert_allclose(both, summed / np.linalg.norm(summed, axis=1, keepdims=True), atol=1e-5)
    assert_unit(model.embed_products(pictures[0], "a sofa"), 1, model)


def test_locate_by_text_and_by_exemplar(model: TrainedModel) -> None:
    picture = photos(1, 64)[0][:, :48]
    for prompt in ("red sofa", photos(2)[1], Image.fromarray(photos(2)[1])):
        regions = model.locate(picture, prompt, limit=3)  # type: ignore[arg-type]
        assert 1 <= len(regions) <= 3
        for region in regions:
            x0, y0, x1, y1 = region.box
            assert 0 <= x0 < x1 <= 48 and 0 <= y0 < y1 <= 64 and 0 < region.score <= 1
            assert region.map.shape == (4, 4) and (region.map >= 0).all() and (region.map <= 1).all()
    cut = model.locate(picture, photos(2)[1], box=(0, 0, 20, 20))
    assert np.allclose(cut[0].map, model.locate(picture, photos(2)[1][:20, :20])[0].map, atol=5e-3)


def test_match_gives_a_probability_for_every_pair(model: TrainedModel) -> None:
    pictures = photos(3)
    found = model.match(pictures, ["red sofa", "lamp"])
    assert found.shape == (3, 2) and (found > 0).all() and (found < 1).all()
    np.testing.assert_allclose(model.match(pictures[1], "lamp"), found[1:2, 1:], atol=1e-5)
    np.testing.assert_allclose(model.match(pictures, ["red sofa", "lamp"], batch_size=1), found, atol=1e-5)


def test_a_model_without_decoder_embeds_and_locates_all_the_same(model: TrainedModel) -> None:
    whole = model.encoder
    plain = TrainedModel(
        Encoder(whole.model, whole.tokenizer, max_tokens=whole.max_tokens, trains_decoder=False), source="clip"
    )
    assert_unit(plain.embed_images(photos(2)), 2, plain)
    assert plain.locate(photos(1)[0], "red sofa")[0].map.min() >= -1
    for ask in (
        lambda: plain.embed_images(photos(2), ["a", "b"]),
        lambda: plain.embed_products(photos(1), ["a"]),
        lambda: plain.match(photos(1), "a"),
    ):
        with pytest.raises(ValueError, match="--objective clip"):
            ask()
    assert_unit(plain.embed_products(photos(1), ["a"], kind="global+text"), 1, plain)


def test_what_is_wrong_is_told_in_one_line(model: TrainedModel, tmp_path: Path) -> None:
    good = photos(1)[0]
    (tmp_path / "photo.jpg").write_bytes(b"x")
    wrong: list[tuple[Any, type[Exception], str]] = [
        (lambda: model.embed_images([]), ValueError, "no images"),
        (lambda: model.embed_images([good, b"junk"]), ValueError, r"images\[1\] \(4 bytes\): not a readable"),
        (lambda: model.embed_images([good, "nowhere.jpg"]), ValueError, r"images\[1\] \(nowhere.jpg\): file not found"),
        (lambda: model.embed_images([good, None]), TypeError, r"images\[1\]"),
        (lambda: model.embed_images([good, good, b"junk"], batch_size=2), ValueError, r"images\[2\] \(4 bytes\)"),
        (lambda: model.embed_images(None), TypeError, "images is a NoneType: give an image, or a list"),  # type: ignore[arg-type]
        (lambda: model.embed_images({"a": good}), TypeError, "images is a dict"),  # type: ignore[arg-type]
        (lambda: model.embed_images([good], [None]), TypeError, r"prompts\[0\]"),  # type: ignore[list-item]
        (lambda: model.locate(good, None), TypeError, "prompts is a NoneType"),  # type: ignore[arg-type]
        (lambda: model.embed_products([good], None), TypeError, "titles is a NoneType"),  # type: ignore[arg-type]
        (lambda: model.embed_images(io.StringIO("x")), TypeError, "opened as text"),  # type: ignore[arg-type]
        (lambda: model.embed_texts(3), TypeError, "texts is a int"),  # type: ignore[arg-type]
        (lambda: model.embed_texts("sofa \ud800"), ValueError, r"texts\[0\].*half a letter"),
        (lambda: model.embed_images([good], boxes=[(90, 0, 99, 9)]), ValueError, r"images\[0\].*box"),
        (lambda: model.embed_images([good], boxes=[]), ValueError, "1 images and 0 boxes"),
        (lambda: model.embed_images([good], batch_size=0), ValueError, "batch_size=0"),
        (lambda: model.embed_images([good], ["a", "b"]), ValueError, "1 images and 2 prompts"),
        (lambda: model.embed_images([good, good], ["a", good]), ValueError, "texts and images together"),
        (lambda: model.embed_images([good], ["a"], instance=False), ValueError, "instance=False"),
        (lambda: model.embed_images([good], [str(tmp_path / "photo.jpg")]), ValueError, "names a file"),
        (lambda: model.embed_texts([]), ValueError, "no texts"),
        (lambda: model.embed_texts(["a", "  \n"]), ValueError, r"texts\[1\] is empty"),
        (lambda: model.embed_texts(["a", None]), TypeError, r"texts\[1\]"),  # type: ignore[list-item]
        (lambda: model.embed_products([good], ["a"], kind="both"), ValueError, "kind='both'"),  # type: ignore[arg-type]
        (lambda: model.embed_products([good], ["a", "b"], kind="global+text"), ValueError, "1 images and 2 titles"),
        (lambda: model.locate(good, ""), ValueError, "empty"),
        (lambda: model.locate(good, "a", box=(0, 0, 9, 9)), ValueError, "part of an exemplar"),
        (lambda: model.locate(good, "a", threshold=1), ValueError, "threshold=1"),
        (lambda: model.locate(good, "a", limit=0), ValueError, "limit=0"),
    ]
    for ask, kind, words in wrong:
        with pytest.raises(kind, match=words) as error:
            ask()
        assert "\n" not in str(error.value)


def test_it_says_what_it_is(model: TrainedModel) -> None:
    assert repr(model) == f"TrainedModel({model.source!r}, embed_dim=32, device='cpu')"
