"""Scenes: boxes of visible pixels against painting by hand, dropped instances, textures."""

import io

import numpy as np
import pytest
from PIL import Image

from eclip.dataloading.demo import scenes
from eclip.dataloading.demo.scenes import MIN_VISIBLE, Sprite, _label_map, _Layer, compose, visible_instances
from eclip.dataloading.demo.textures import KINDS, surface, texture
from eclip.dataloading.schema import SOURCES


def rectangle(width: int, height: int, colour: tuple[int, int, int] = (200, 0, 0)) -> Image.Image:
    return Image.new("RGBA", (width, height), (*colour, 255))


def sprites(count: int) -> list[Sprite]:
    return [Sprite(product=f"p{i}", sku=f"p{i}-0", view=rectangle(80, 60, (40 * i, 90, 160))) for i in range(count)]


def test_boxes_are_of_visible_pixels() -> None:
    layers = [
        _Layer(rectangle(20, 10), 5, 8, 1),
        _Layer(rectangle(30, 10), -10, 40, 2),  # a third off the canvas
        _Layer(rectangle(5, 30), 20, 0, 255),  # hides the right quarter of the first
    ]
    first, second = visible_instances(_label_map(layers, 64), layers, sprites(2))
    assert first.box == (5, 8, 20, 18) and first.visible == 0.75
    assert second.box == (0, 40, 20, 50) and second.visible == pytest.approx(2 / 3, abs=1e-3)


def test_hidden_instances_are_left_out() -> None:
    layers = [_Layer(rectangle(20, 20), 0, 0, 2), _Layer(rectangle(20, 14), 0, 0, 1)]  # 30% of the lower is seen
    assert [i.product for i in visible_instances(_label_map(layers, 64), layers, sprites(2))] == ["p0"]


def test_translucent_pixels_count() -> None:
    glass = Image.new("RGBA", (10, 10), (200, 200, 200, 100))
    layers = [_Layer(glass, 3, 4, 1)]
    assert visible_instances(_label_map(layers, 32), layers, sprites(1))[0].box == (3, 4, 13, 14)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("count", [1, 4, 7])
def test_titled_product_comes_first_and_is_visible(source: str, count: int) -> None:
    for seed in range(8):
        data, instances = compose(source, sprites(count), 96, np.random.default_rng(seed))
        with Image.open(io.BytesIO(data)) as picture:
            assert picture.size == (96, 96) and picture.mode == "RGB"
        assert instances[0].product == "p0" and instances[0].visible >= MIN_VISIBLE
        longest = max(instances[0].box[2] - instances[0].box[0], instances[0].box[3] - instances[0].box[1])
        assert longest <= 0.9 * 96


def test_boxes_agree_with_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without lighting, blur and JPEG the pixels of the titled product's pure colour are exactly its box."""
    monkeypatch.setattr(scenes, "_lit", lambda picture, *_: picture)
    pure = Sprite(product="p0", sku="s", view=rectangle(80, 60, (255, 0, 255)))
    for seed in range(6):
        rng = np.random.default_rng(seed)
        canvas, layers, _ = scenes._ad([pure, *sprites(3)[1:]], 96, rng)
        (instance, *_) = visible_instances(_label_map(layers, 96), layers, [pure, *sprites(3)[1:]])
        mine = (np.asarray(canvas) == (255, 0, 255)).all(-1)
        xs, ys = np.flatnonzero(mine.any(0)), np.flatnonzero(mine.any(1))
        assert instance.box == (xs[0], ys[0], xs[-1] + 1, ys[-1] + 1)


def test_scenes_are_reproducible() -> None:
    for source in SOURCES:
        one, two = (compose(source, sprites(3), 64, np.random.default_rng(5)) for _ in range(2))
        assert one == two


def test_number_of_distractors() -> None:
    rng = np.random.default_rng(0)
    drawn = np.array([scenes.num_distractors("customer", rng) for _ in range(400)])
    assert drawn.min() == 2 and drawn.max() == 6 and np.median(drawn) <= 3
    assert {scenes.num_distractors("customer", rng, (1, 3)) for _ in range(100)} == {1, 2, 3}
    assert scenes.num_distractors("detail", rng) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_textures(kind: str) -> None:
    picture = texture(kind, 3, 96)
    assert picture.size == (96, 96) and picture.mode == "RGB"
    again = texture.__wrapped__(kind, 3, 96)
    assert np.array_equal(np.asarray(picture), np.asarray(again))
    assert surface(np.random.default_rng(0), (kind,), 64, 20).size == (64, 20)
