"""What a step trains on: products, image pairs and crops, as pure functions of (seed, step, position).

No generator carries state. Every random number is a hash of its coordinates, so a run resumes at any step, and neither
the number of ranks, nor that of workers, nor the decoder changes what is drawn.

Letters: P products, B rows of a part (parts.py). A step takes as many positions of an endless stream of products as its
global batch has rows, from where the step before it ended: a permutation for epoch 0, then one for epoch 1, and so on.
The draws of a row are of its step and its place in the global batch, whichever rank and part holds it.
"""

import numpy as np
from numpy.typing import NDArray

from .parts import Parts
from .shards import ShardIndex

Rows = NDArray[np.int64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_STREAM_ORDER, _STREAM_PAIR, _STREAM_CROP = 0, 1, 2  # crops of view v use stream _STREAM_CROP + v
NUM_CROP_DRAWS = 5
TAR_WINDOW = 64  # 64 tars of 256 MB: 16 GB are shuffled together, and the rest of the disk is not touched meanwhile


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): a bijection whose output bits look independent."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hash64(*coordinates: int | NDArray[np.int64]) -> NDArray[np.uint64]:
    """Hash integer coordinates, broadcast against each other, to uint64."""
    state = np.zeros(1, np.uint64)
    for value in coordinates:
        state = _mix((state ^ np.asarray(value, np.int64).astype(np.uint64)) + _GOLDEN)
    return state


def uniforms(seed: int, stream: int, step: int, positions: Rows, count: int) -> NDArray[np.float64]:
    """(len(positions), count) numbers in [0, 1): `count` draws for each position."""
    bits = hash64(seed, stream, step, positions[:, None], np.arange(count)[None, :])
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def random_crop(
    draws: NDArray[np.float64], width: int, height: int, scale: tuple[float, float]
) -> tuple[int, int, int, int]:
    """x0, y0, x1, y1 of a random resized crop, pixels, half-open; draws: (>= 4,) numbers in [0, 1).

    Area share uniform in `scale`, log aspect ratio uniform in [log 3/4, log 4/3] as far as the crop still fits in the
    image; no rejection loop, so four draws always suffice.
    """
    area = scale[0] + (scale[1] - scale[0]) * draws[0]
    fit = width / height  # a crop of aspect r fits if area * fit <= r <= fit / area
    low, high = np.log(np.clip([3 / 4, 4 / 3], area * fit, fit / area))
    aspect = np.exp(low + (high - low) * draws[1])
    w = min(width, max(1, round(float(np.sqrt(area * width * height * aspect)))))
    h = min(height, max(1, round(float(np.sqrt(area * width * height / aspect)))))
    x, y = int(draws[2] * (width - w + 1)), int(draws[3] * (height - h + 1))
    return x, y, x + w, y + h


class Sampler:
    """Draws of one split for one rank; `draw` is a pure function of (seed, schedule, step, part)."""

    def __init__(self, index: ShardIndex, parts: Parts, *, seed: int):
        self.index, self.parts, self.seed = index, parts, seed
        self._orders: dict[int, Rows] = {}

    def epoch(self, step: int) -> int:
        """The epoch that a step begins in."""
        return self.parts.schedule.position(step) // self.index.num_products

    def order(self, epoch: int) -> Rows:
        """(P,) the products of an epoch in order: tars shuffled, then products inside windows of TAR_WINDOW tars."""
        if epoch not in self._orders:
            tar = self.index.product_shard
            tar_key = hash64(self.seed, _STREAM_ORDER, epoch, -1, np.arange(tar[-1] + 1))
            place = np.argsort(np.argsort(tar_key, kind="stable"))
            key = hash64(self.seed, _STREAM_ORDER, epoch, np.arange(len(tar)))
            self._orders = {e: o for e, o in self._orders.items() if e >= epoch - 1}
            self._orders[epoch] = np.lexsort((key, place[tar] // TAR_WINDOW))
        return self._orders[epoch]

    def products(self, step: int, part: int = 0) -> Rows:
        """(B,) the products of a part."""
        positions = self.parts.schedule.position(step) + np.array(self.parts.positions(step, part))
        epochs, offsets = np.divmod(positions, self.index.num_products)
        products = np.empty_like(offsets)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            products[here] = self.order(int(epoch))[offsets[here]]
        return products

    def _pair(self, p: int, draws: NDArray[np.float64]) -> tuple[int, int]:
        """Rows of two images of one SKU, from different sources if it has them."""
        low, high = self.index.image_start[p], self.index.image_start[p + 1]
        sku, source = self.index.image_sku[low:high], self.index.image_source[low:high]
        choices = np.unique(sku)
        mine = sku == choices[int(draws[0] * len(choices))]
        first = np.flatnonzero(mine)[int(draws[1] * mine.sum())]
        other = np.arange(high - low) != first
        for wanted in (mine & (source != source[first]), mine & other, source != source[first], other):
            if wanted.any():
                return int(low + first), int(low + np.flatnonzero(wanted)[int(draws[2] * wanted.sum())])
        return int(low + first), int(low + first)

    def draw(self, step: int, part: int = 0) -> tuple[Rows, NDArray[np.float64]]:
        """Image rows (B, 2) and the draws of their crops and flips (B, 2, NUM_CROP_DRAWS) of a part."""
        positions = np.array(self.parts.positions(step, part))
        pair_draws = uniforms(self.seed, _STREAM_PAIR, step, positions, 3)
        rows = [self._pair(int(p), u) for p, u in zip(self.products(step, part), pair_draws, strict=True)]
        crops = [uniforms(self.seed, _STREAM_CROP + view, step, positions, NUM_CROP_DRAWS) for view in (0, 1)]
        return np.array(rows, np.int64).reshape(-1, 2), np.stack(crops, 1)

    def substitutes(self, row: int, other: int) -> list[int]:
        """Rows to try in the place of an undecodable one, best first; `other` is the row of the other view.

        First the product's other images (another source than the other view's, then the same SKU, then the nearest
        following), then `other` itself; when the whole product is bad, the images of the next product.
        """
        index, p = self.index, self.index.product_of(row)
        found: list[int] = []
        for q in (p, (p + 1) % index.num_products):
            low, high = index.image_start[q], index.image_start[q + 1]
            rows = np.roll(np.arange(low, high), -(row - low) if q == p else 0)
            rank = (
                4 * (rows == other)
                + 2 * (index.image_source[rows] == index.image_source[other])
                + (index.image_sku[rows] != index.image_sku[row])
            )
            found += [int(r) for r in rows[np.argsort(rank, kind="stable")] if r != row]
        return found
