"""A made catalogue for timing searches: clustered unit vectors and titles, as many as wanted, a block at a time.

Vectors of a model lie in clumps, pictures of a product within products of a kind, of few directions: here 64 of the D,
a kind for every 400 rows, a product for every 5, cosines of about 0.7 within a product and 0.5 within a kind. So half
of a query's ten nearest are of other products of its kind, among 80. Plain Gaussian vectors, all equally far from each
other, would make any index but a flat one look bad, and no catalogue is like that.

Letters: n rows, D numbers of a vector.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float32]
BLOCK = 10_000
_DIRECTIONS, _KIND_ROWS, _PRODUCT_ROWS = 64, 400, 5
_PRODUCT_SPREAD, _PICTURE_SPREAD = 0.85, 0.65
COLOURS = (
    *("red", "blue", "green", "white", "black", "grey", "beige", "brown"),
    *("pink", "purple", "orange", "yellow"),
)
KINDS = (
    *("armchair", "sofa", "lamp", "desk", "bed", "shelf", "stool", "table"),
    *("cupboard", "mirror", "rug", "vase", "clock", "bench", "basket"),
)
WORDS = (
    *("oak", "steel", "velvet", "rattan", "modern", "classic", "folding", "round"),
    *("tall", "small", "garden", "office", "kitchen", "nordic"),
)


class MadeCatalogue:
    """`rows` rows of `dim` numbers; the same seed gives the same ones."""

    def __init__(self, rows: int, dim: int, seed: int = 0) -> None:
        rng = np.random.default_rng([seed, rows])
        self.rows, self.dim, self.seed = rows, dim, seed
        spread = rng.standard_normal((_DIRECTIONS, dim), np.float32)
        kinds = _unit(rng.standard_normal((max(1, rows // _KIND_ROWS), _DIRECTIONS), np.float32))
        own = _unit(rng.standard_normal((max(1, rows // _PRODUCT_ROWS), _DIRECTIONS), np.float32))
        own = kinds[np.arange(len(own)) % len(kinds)] + _PRODUCT_SPREAD * own
        self.products = _unit(own @ spread)

    def vectors(self, products: NDArray[np.int64], rng: np.random.Generator) -> Vectors:
        """(n, D): a new picture of each of these products."""
        noise = _unit(rng.standard_normal((len(products), self.dim), np.float32))
        return _unit(self.products[products] + _PICTURE_SPREAD * noise)

    def blocks(self) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], Vectors]]:
        """Row numbers, product numbers, vectors."""
        for start in range(0, self.rows, BLOCK):
            numbers = np.arange(start, min(start + BLOCK, self.rows))
            products = numbers % len(self.products)
            yield numbers, products, self.vectors(products, np.random.default_rng([self.seed, 1, start]))

    def queries(self, count: int) -> Vectors:
        """(count, D): pictures that the catalogue has not, of products that it has."""
        rng = np.random.default_rng([self.seed, 2])
        return self.vectors(rng.integers(0, len(self.products), count), rng)


def title(product: int) -> str:
    """Of a product: "Red oak armchair 1234"."""
    colour, kind = COLOURS[product % len(COLOURS)], KINDS[product // 7 % len(KINDS)]
    return f"{colour.capitalize()} {WORDS[product // 3 % len(WORDS)]} {kind} {product}"


def _unit(vectors: Vectors) -> Vectors:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
