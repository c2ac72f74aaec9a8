"""Scenes of the embedded catalogue: detail page, customer photo, advertisement frame.

A scene is painted back to front. Beside the picture a label map says which layer owns each pixel, so that boxes and
visible shares are those of the pixels one really sees. Layers: 0 background, k >= 1 the k-th product, 255 anything
else in front. Blur, cast and JPEG noise come after the boxes and move nothing.
"""

import colorsys
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from ..schema import SOURCES, Instance
from .textures import calm_colour, surface

MIN_VISIBLE = 0.35
"""An instance of which less is seen is left out of the record; the titled product is never less visible."""
DISTRACTORS = (2, 6)
"""Distractors in a customer photo, both ends included; few are likelier (halving), so that 2 or 3 are typical."""

_OTHER = 255
_OPAQUE = 40  # a beer glass has alpha 100, an anti-aliased rim less
_ATTEMPTS = 12


@dataclass(frozen=True, kw_only=True)
class Sprite:
    """A cut-out product: an RGBA view cropped to its pixels, and whose it is."""

    product: str
    sku: str
    view: Image.Image


@dataclass
class _Layer:
    picture: Image.Image
    x: int
    y: int
    label: int

    @property
    def opaque(self) -> np.ndarray:
        return np.asarray(self.picture.getchannel("A")) >= _OPAQUE


def _label_map(layers: Sequence[_Layer], size: int) -> np.ndarray:
    """Who owns each pixel, later layers over earlier ones. Returns (size, size) uint8."""
    labels = np.zeros((size, size), np.uint8)
    for layer in layers:
        mask = layer.opaque
        top, left = max(0, -layer.y), max(0, -layer.x)
        bottom, right = min(mask.shape[0], size - layer.y), min(mask.shape[1], size - layer.x)
        if bottom > top and right > left:
            window = labels[layer.y + top : layer.y + bottom, layer.x + left : layer.x + right]
            window[mask[top:bottom, left:right]] = layer.label
    return labels


def _visible_share(labels: np.ndarray, layer: _Layer) -> float:
    return float((labels == layer.label).sum()) / max(1, int(layer.opaque.sum()))


def visible_instances(labels: np.ndarray, layers: Sequence[_Layer], sprites: Sequence[Sprite]) -> tuple[Instance, ...]:
    """The instances at least MIN_VISIBLE visible, in the order of `sprites`, with boxes of their visible pixels."""
    instances = []
    for layer in sorted((v for v in layers if v.label != _OTHER), key=lambda v: v.label):
        share = _visible_share(labels, layer)
        if share >= MIN_VISIBLE:
            mine = labels == layer.label
            ys, xs = np.flatnonzero(mine.any(1)), np.flatnonzero(mine.any(0))
            box = (float(xs[0]), float(ys[0]), float(xs[-1] + 1), float(ys[-1] + 1))
            sprite = sprites[layer.label - 1]
            instances.append(Instance(product=sprite.product, sku=sprite.sku, box=box, visible=round(share, 3)))
    return tuple(instances)


def _scaled(view: Image.Image, longest: float, tilt: float = 0.0) -> Image.Image:
    """The view with its longer side `longest` pixels, turned by `tilt` degrees and cropped to its pixels again."""
    scale = longest / max(view.size)
    size = (max(3, round(view.width * scale)), max(3, round(view.height * scale)))
    picture = view.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)
    if tilt:
        picture = picture.rotate(tilt, Image.Resampling.BICUBIC, expand=True)
        picture = picture.crop(picture.getchannel("A").point([0] * _OPAQUE + [255] * (256 - _OPAQUE)).getbbox())
    return picture


def _spot() -> Image.Image:
    y, x = np.mgrid[-1:1:64j, -1:1:64j]
    return Image.fromarray((255 * np.clip(1 - np.hypot(x, y), 0, 1) ** 1.5).astype(np.uint8), mode="L")


_SPOT = _spot()


def _paint(canvas: Image.Image, layers: Sequence[_Layer], shadow: float) -> None:
    for layer in layers:
        width, height = layer.picture.size
        if shadow and layer.label != _OTHER:  # a soft contact shadow under the object's foot
            spot = _SPOT.resize((max(4, int(width * 1.3)), max(4, int(0.12 * width + 0.1 * height))))
            at = (layer.x - int(0.15 * width), layer.y + height - spot.height // 2 - spot.height // 8)
            canvas.paste((20, 18, 16), at, spot.point([int(v * shadow) for v in range(256)]))
        canvas.paste(layer.picture, (layer.x, layer.y), layer.picture)


def _inside(rng: np.random.Generator, size: int, length: int, cut: float) -> int:
    """A start so that at most the share `cut` of `length` falls off the canvas."""
    low, high = sorted((-cut * length, size - (1 - cut) * length))
    return round(rng.uniform(low, high))


def _overlap(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> float:
    """Intersection of two boxes over the area of the smaller."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    smaller = min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1]))
    return max(0, width) * max(0, height) / smaller


def _box(layer: _Layer) -> tuple[int, int, int, int]:
    return layer.x, layer.y, layer.x + layer.picture.width, layer.y + layer.picture.height


def _place_beside(
    rng: np.random.Generator,
    picture: Image.Image,
    label: int,
    placed: Sequence[_Layer],
    size: int,
    *,
    tries: int,
    cut: float,
) -> _Layer:
    """Put a picture where it overlaps least of `tries` random places, up to the share `cut` off the canvas."""
    spots = []
    for _ in range(tries):
        x, y = _inside(rng, size, picture.width, cut), _inside(rng, size, picture.height, cut)
        spots.append(_Layer(picture, x, y, label))
    return min(spots, key=lambda spot: sum(_overlap(_box(spot), _box(other)) for other in placed))


def _jpeg(picture: Image.Image, quality: int) -> bytes:
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=quality)
    return out.getvalue()


def _lit(picture: Image.Image, rng: np.random.Generator, strength: float, noise: float, cast: float) -> Image.Image:
    """Light falling off across the picture, a colour cast and sensor noise; strengths as standard deviations."""
    size = picture.width
    y, x = np.mgrid[-0.5 : 0.5 : size * 1j, -0.5 : 0.5 : size * 1j].astype(np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    light = 1 + strength * (x * np.cos(angle) + y * np.sin(angle))
    gains = (1 + cast * rng.standard_normal(3)).clip(0.75, 1.25).astype(np.float32)
    pixels = np.asarray(picture, np.float32) * (light[..., None].astype(np.float32) * gains)
    if noise:
        pixels += noise * rng.standard_normal((size, size, 3), dtype=np.float32)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8), mode="RGB")


def _detail(sprites: Sequence[Sprite], size: int, rng: np.random.Generator) -> tuple[Image.Image, list[_Layer], int]:
    roll = rng.random()
    if roll < 0.4:
        tone = int(rng.integers(238, 256))
        canvas = Image.new("RGB", (size, size), (tone, tone, tone))
    elif roll < 0.8:
        canvas = surface(rng, ("gradient", "plaster"), size).point([min(255, 130 + v // 2) for v in range(256)] * 3)
    else:
        canvas = surface(rng, ("wood", "fabric"), size)
    picture = _scaled(sprites[0].view, rng.uniform(0.6, 0.8) * size)
    layer = _Layer(picture, _inside(rng, size, picture.width, 0.0), _inside(rng, size, picture.height, 0.0), 1)
    _paint(canvas, [layer], shadow=rng.uniform(0.15, 0.5))
    if rng.random() < 0.5:
        canvas = _lit(canvas, rng, rng.uniform(0.05, 0.3), 0.0, 0.01)
    return canvas, [layer], int(rng.integers(85, 95))


def _room(size: int, rng: np.random.Generator) -> Image.Image:
    """A wall and a floor or table top, or one surface seen from above."""
    if rng.random() < 0.4:
        return surface(rng, ("wood", "fabric", "plaster"), size)
    canvas = surface(rng, ("plaster", "gradient", "shelves", "shelves"), size)
    horizon = int(rng.uniform(0.5, 0.8) * size)
    canvas.paste(surface(rng, ("wood", "fabric", "plaster"), size, size - horizon), (0, horizon))
    edge = tuple(int(c * 0.5) for c in calm_colour(rng))
    ImageDraw.Draw(canvas).line((0, horizon, size, horizon), fill=edge, width=max(1, size // 100))
    return canvas


def _scatter(canvas: Image.Image, rng: np.random.Generator) -> None:
    """A few flat things that are no product: papers, rugs, plates; soft, behind everything."""
    size = canvas.width
    draw = ImageDraw.Draw(canvas)
    for _ in range(int(rng.integers(0, 4))):
        width, height = rng.uniform(0.1, 0.4, size=2) * size
        x, y = rng.uniform(-0.1, 0.9, size=2) * size
        shape = draw.ellipse if rng.random() < 0.4 else draw.rectangle
        shape((x, y, x + width, y + height), fill=tuple(int(c) for c in calm_colour(rng)))


def _occluder(size: int, rng: np.random.Generator) -> _Layer:
    """A leaf, cloth or edge of furniture that reaches into the picture from one side."""
    width, height = (int(rng.uniform(*r) * size) for r in ((0.15, 0.35), (0.2, 0.6)))
    if rng.random() < 0.5:
        width, height = height, width
    shape = Image.new("L", (width, height))
    draw = ImageDraw.Draw(shape)
    if rng.random() < 0.5:
        draw.ellipse((0, 0, width - 1, height - 1), fill=255)
    else:
        draw.rounded_rectangle((0, 0, width - 1, height - 1), radius=min(width, height) // 6, fill=255)
    picture = surface(rng, ("fabric", "wood", "gradient"), size).crop((0, 0, width, height))
    picture.putalpha(shape)
    near, far = int(-0.4 * min(width, height)), size - int(0.6 * min(width, height))
    if width < height:  # reaches in from the left or right
        x, y = near if rng.random() < 0.5 else far, int(rng.uniform(0, size - height))
    else:  # from above or, more often, below
        x, y = int(rng.uniform(0, size - width)), near if rng.random() < 0.3 else far
    return _Layer(picture, x, y, _OTHER)


def _customer(sprites: Sequence[Sprite], size: int, rng: np.random.Generator) -> tuple[Image.Image, list[_Layer], int]:
    canvas = _room(size, rng)
    _scatter(canvas, rng)
    canvas = canvas.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 1.2) * size / 160))
    layers: list[_Layer] = []
    for attempt in range(_ATTEMPTS):
        picture = _scaled(sprites[0].view, rng.uniform(0.42, 0.75) * size, rng.normal(0, 5))
        main = _Layer(picture, _inside(rng, size, picture.width, 0.1), _inside(rng, size, picture.height, 0.1), 1)
        others: list[_Layer] = []
        for k, sprite in enumerate(sprites[1:], start=2):
            small = _scaled(sprite.view, rng.uniform(0.25, 0.5) * size, rng.normal(0, 5))
            others.append(_place_beside(rng, small, k, [main, *others], size, tries=int(rng.integers(2, 9)), cut=0.25))
        front = rng.random(len(others)) < 0.35
        behind = sorted((v for v, f in zip(others, front, strict=True) if not f), key=lambda v: v.y + v.picture.height)
        layers = [*behind, main, *(v for v, f in zip(others, front, strict=True) if f)]
        if rng.random() < 0.2:
            layers.append(_occluder(size, rng))
        if attempt == _ATTEMPTS - 1:  # give up hiding it: the titled product goes to the front
            layers = [v for v in layers if v is not main] + [main]
        if _visible_share(_label_map(layers, size), main) >= MIN_VISIBLE + 0.05:
            break
    _paint(canvas, layers, shadow=rng.uniform(0.2, 0.5))
    if rng.random() < 0.6:
        canvas = canvas.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.9) * size / 160))
    canvas = _lit(canvas, rng, rng.uniform(0.1, 0.5), rng.uniform(0, 6), 0.05)
    return canvas, layers, int(rng.integers(45, 85))


def _bright(rng: np.random.Generator) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.25, 0.75), rng.uniform(0.45, 0.95))
    return int(red * 255), int(green * 255), int(blue * 255)


def _text_bars(
    draw: ImageDraw.ImageDraw, rng: np.random.Generator, x: float, y: float, width: float, size: int
) -> None:
    """Lines of word-like bars: a headline and one to three lines of small print."""
    ink = (30, 30, 35) if rng.random() < 0.6 else (250, 250, 250)
    for line in range(int(rng.integers(2, 5))):
        height = size * (0.045 if line == 0 else 0.02)
        at = x
        while True:
            word = rng.uniform(2.0, 6.0) * height
            if at + word > x + width:
                break
            draw.rectangle((at, y, at + word, y + height), fill=ink)
            at += word + 0.8 * height
        y += 1.9 * height


def _ad(sprites: Sequence[Sprite], size: int, rng: np.random.Generator) -> tuple[Image.Image, list[_Layer], int]:
    canvas = Image.new("RGB", (size, size), _bright(rng))
    draw = ImageDraw.Draw(canvas)
    style = int(rng.integers(4))
    cut = rng.uniform(0.3, 0.7) * size
    if style == 0:
        draw.rectangle((0, 0, cut, size), fill=_bright(rng))
    elif style == 1:
        draw.rectangle((0, cut, size, size), fill=_bright(rng))
    elif style == 2:
        lean = rng.uniform(-0.3, 0.3) * size
        draw.polygon([(0, 0), (cut + lean, 0), (cut - lean, size), (0, size)], fill=_bright(rng))
    else:
        radius = rng.uniform(0.3, 0.5) * size
        x, y = rng.uniform(0.3, 0.7, size=2) * size
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=_bright(rng))
    top = rng.random() < 0.5
    _text_bars(draw, rng, 0.05 * size, (0.05 if top else 0.8) * size, rng.uniform(0.4, 0.9) * size, size)

    picture = _scaled(sprites[0].view, rng.uniform(0.42, 0.68) * size)
    main = _Layer(picture, _inside(rng, size, picture.width, 0.0), _inside(rng, size, picture.height, 0.0), 1)
    layers = [main]
    for k, sprite in enumerate(sprites[1:], start=2):
        small = _scaled(sprite.view, rng.uniform(0.22, 0.4) * size)
        layers.append(_place_beside(rng, small, k, layers, size, tries=16, cut=0.05))
    layers.reverse()  # the advertised product is in front
    if rng.random() < 0.35:  # a price badge stuck over a corner
        side = int(rng.uniform(0.14, 0.22) * size)
        badge = Image.new("RGBA", (side, side))
        pen = ImageDraw.Draw(badge)
        pen.ellipse((0, 0, side - 1, side - 1), fill=(*_bright(rng), 255))
        pen.rectangle((side * 0.25, side * 0.42, side * 0.75, side * 0.58), fill=(255, 255, 255, 255))
        corner = rng.integers(0, 2, size=2) * (size - side - size // 40) + size // 80
        layers.append(_Layer(badge, int(corner[0]), int(corner[1]), _OTHER))
    if _visible_share(_label_map(layers, size), main) < MIN_VISIBLE:
        layers = [v for v in layers if v.label != _OTHER]
    _paint(canvas, layers, shadow=rng.uniform(0.0, 0.3))
    return canvas, layers, int(rng.integers(70, 92))


_COMPOSE = dict(zip(SOURCES, (_detail, _customer, _ad), strict=True))


def num_distractors(source: str, rng: np.random.Generator, distractors: tuple[int, int] = DISTRACTORS) -> int:
    """How many other products a scene of this source shows: none, `distractors` (few are likelier), one to three."""
    if source == "detail":
        return 0
    low, high = distractors if source == "customer" else (1, 3)
    odds = 0.5 ** np.arange(high - low + 1)
    return low + int(rng.choice(high - low + 1, p=odds / odds.sum()))


def compose(
    source: str, sprites: Sequence[Sprite], size: int, rng: np.random.Generator
) -> tuple[bytes, tuple[Instance, ...]]:
    """Compose one scene: the titled product is sprites[0], the others are its distractors.

    Returns the JPEG (size x size) and the instances seen, the titled product first, boxes in pixels of the JPEG.
    """
    canvas, layers, quality = _COMPOSE[source](sprites, size, rng)
    return _jpeg(canvas, quality), visible_instances(_label_map(layers, size), layers, sprites)
