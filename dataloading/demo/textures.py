"""Calm procedural surfaces for the demo's backgrounds: plaster, gradients, wood, fabric, shelves.

Textures are drawn once per process into a pool and cropped from it. A texture depends on (kind, number, side) only,
so scenes are the same whatever process draws them.
"""

import colorsys
from collections.abc import Callable
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

POOL_SIZE = 16  # textures of each kind: with crop, flip and tint no two backgrounds look alike

_KIND_SEED = 7711


def calm_colour(rng: np.random.Generator, saturation: tuple[float, float] = (0.02, 0.22)) -> np.ndarray:
    """A muted colour, two in three of the warm hues of interiors. Returns (3,) float32 in 0..255."""
    hue = rng.uniform(0.03, 0.15) if rng.random() < 2 / 3 else rng.random()
    value = rng.uniform(0.45, 0.95)
    return np.asarray(colorsys.hsv_to_rgb(hue, rng.uniform(*saturation), value), np.float32) * 255


def smooth_noise(rng: np.random.Generator, height: int, width: int, cells: tuple[int, int]) -> np.ndarray:
    """Bicubically enlarged white noise. Returns (height, width) float32, about standard normal at the grid points."""
    grid = Image.fromarray(rng.standard_normal(cells).astype(np.float32), mode="F")
    return np.asarray(grid.resize((width, height), Image.Resampling.BICUBIC))


def _image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8), mode="RGB")


def _plaster(rng: np.random.Generator, side: int) -> Image.Image:
    cells = int(rng.integers(3, 8))
    relief = 7 * smooth_noise(rng, side, side, (cells, cells)) + 3 * smooth_noise(
        rng, side, side, (side // 6, side // 6)
    )
    relief = relief + rng.uniform(1, 4) * rng.standard_normal((side, side))
    return _image(calm_colour(rng) + relief[..., None])


def _gradient(rng: np.random.Generator, side: int) -> Image.Image:
    y, x = np.mgrid[0:side, 0:side].astype(np.float32) / side
    angle = rng.uniform(0, 2 * np.pi)
    t = np.clip(0.5 + (x - 0.5) * np.cos(angle) + (y - 0.5) * np.sin(angle), 0, 1)[..., None]
    near, far = calm_colour(rng), calm_colour(rng)
    return _image(near * (1 - t) + (0.5 * near + 0.5 * far) * t + rng.standard_normal((side, side, 1)))


def _wood(rng: np.random.Generator, side: int) -> Image.Image:
    # Hue 0.05-0.11: oak to walnut. The grain runs along x: streaks are noise stretched 20:1, rings a warped sine.
    base = (
        np.asarray(colorsys.hsv_to_rgb(rng.uniform(0.05, 0.11), rng.uniform(0.25, 0.6), rng.uniform(0.4, 0.85))) * 255
    )
    y = np.arange(side, dtype=np.float32)[:, None] / side
    warp = smooth_noise(rng, side, side, (6, 3)) * rng.uniform(0.04, 0.1)
    rings = np.sin(2 * np.pi * rng.uniform(5, 14) * (y + warp))
    streaks = smooth_noise(rng, side, side, (side // 2, max(2, side // 40)))
    pixels = base * (1 + 0.06 * rings + 0.05 * streaks)[..., None]
    planks = int(rng.integers(0, 6))
    for p in range(planks):
        top, bottom = p * side // planks, (p + 1) * side // planks
        pixels[top:bottom] *= rng.uniform(0.88, 1.08)
        pixels[top : top + max(1, side // 160)] *= 0.6
    return _image(pixels).rotate(90) if rng.random() < 0.3 else _image(pixels)


def _fabric(rng: np.random.Generator, side: int) -> Image.Image:
    y, x = np.mgrid[0:side, 0:side].astype(np.float32)
    period = rng.uniform(3, 6)
    weave = np.sin(2 * np.pi * x / period) * np.sin(2 * np.pi * y / period)
    folds = smooth_noise(rng, side, side, (int(rng.integers(2, 5)), int(rng.integers(2, 7))))
    base = calm_colour(rng, (0.05, 0.35))
    pixels = np.broadcast_to(base, (side, side, 3)).copy()
    if rng.random() < 0.5:
        stripe = calm_colour(rng, (0.05, 0.35)) * 0.5 + base * 0.5
        width = side / rng.uniform(4, 14)
        pixels[(x // width) % 2 == 1] = stripe
        if rng.random() < 0.4:
            pixels[(y // width) % 2 == 1] *= 0.9
    return _image(pixels * (1 + 0.05 * weave + 0.09 * folds)[..., None])


def _shelves(rng: np.random.Generator, side: int) -> Image.Image:
    picture = _plaster(rng, side)
    draw = ImageDraw.Draw(picture)
    board = calm_colour(rng, (0.2, 0.5)) * 0.8
    rows, thick = int(rng.integers(2, 5)), max(2, side // 40)
    for row in range(rows):
        foot = (row + 1) * side // rows - int(rng.integers(0, side // 12))
        x = float(rng.uniform(0, side / 4))
        while rng.random() < 0.9 and x < side:  # a run of books, then gaps
            width, height = rng.uniform(0.03, 0.07) * side, rng.uniform(0.35, 0.75) * side / rows
            spine = tuple(int(c) for c in calm_colour(rng, (0.1, 0.5)) * 0.85)
            draw.rectangle((x, foot - height, x + width, foot), fill=spine)
            x += width + (rng.uniform(0.1, 0.4) * side if rng.random() < 0.2 else 1)
        draw.rectangle((0, foot, side, foot + thick), fill=tuple(int(c) for c in board))
        draw.rectangle((0, foot + thick, side, foot + thick + thick // 2), fill=tuple(int(c * 0.6) for c in board))
    return picture.filter(ImageFilter.GaussianBlur(side / 200))  # shelves stand behind the focus


_DRAW: dict[str, Callable[[np.random.Generator, int], Image.Image]] = {
    "plaster": _plaster,
    "gradient": _gradient,
    "wood": _wood,
    "fabric": _fabric,
    "shelves": _shelves,
}
KINDS = tuple(_DRAW)


@cache
def texture(kind: str, number: int, side: int) -> Image.Image:
    """Texture `number` of a kind, side x side pixels, RGB; drawn at first use."""
    return _DRAW[kind](np.random.default_rng([_KIND_SEED, KINDS.index(kind), number]), side)


def surface(
    rng: np.random.Generator, kinds: tuple[str, ...], image_size: int, height: int | None = None
) -> Image.Image:
    """A random crop of a random texture of the given kinds, mirrored and tinted. Returns image_size x height, RGB.

    The pool's textures have 1.5 times the side of the image; `height` defaults to image_size and must not exceed it.
    """
    side, width, height = 3 * image_size // 2, image_size, height or image_size
    picture = texture(kinds[int(rng.integers(len(kinds)))], int(rng.integers(POOL_SIZE)), side)
    x, y = int(rng.integers(side - width + 1)), int(rng.integers(side - height + 1))
    picture = picture.crop((x, y, x + width, y + height))
    if rng.random() < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    gains = rng.uniform(0.9, 1.05) * rng.uniform(0.94, 1.06, size=3)
    return picture.point([min(255, int(v * g)) for g in gains for v in range(256)])
