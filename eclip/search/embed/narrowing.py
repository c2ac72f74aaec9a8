"""Narrower vectors: the first numbers of them (Matryoshka's cut), perhaps turned before so that little is lost.

A model that was not trained for it spreads what it knows over all D numbers, so a plain cut throws a share of it away.
An orthogonal rotation changes no cosine; the one of the right singular vectors (uncentred: cosines are about the
origin) brings as much as possible of the vectors' lengths into the first d. `choose` measures both ways on the vectors
themselves and takes what loses less. Queries have to be turned alike: the index holds the rotation.

Letters: n vectors, D numbers each, d kept.
"""

import base64
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float32]
_SAMPLE, _QUERIES, _NEIGHBOURS = 4000, 500, 10
ROTATION = b"eclip.rotation"
"""Of the table's metadata: the columns that are kept, (D, d) float32, row by row, in base64."""


@dataclass(frozen=True)
class Narrowing:
    """From (n, D) unit vectors to (n, d) unit vectors."""

    dim: int
    rotation: Vectors | None = None
    """(D, d), orthonormal columns; None cuts without a turn."""

    def __call__(self, vectors: Vectors) -> Vectors:
        """(n, d), of unit length again."""
        cut = vectors[:, : self.dim] if self.rotation is None else vectors @ self.rotation
        length = np.linalg.norm(cut, axis=1, keepdims=True)
        return np.asarray(cut / np.maximum(length, 1e-12), np.float32)

    def metadata(self) -> dict[bytes, bytes]:
        """What the table keeps of it."""
        if self.rotation is None:
            return {}
        return {ROTATION: base64.b64encode(np.ascontiguousarray(self.rotation, "<f4").tobytes())}

    @classmethod
    def of_index(cls, record: dict[str, Any], metadata: dict[bytes, bytes]) -> "Narrowing":
        """That of an index, for its queries."""
        data = metadata.get(ROTATION)
        dim = int(record["dim"])
        if data is None:
            return cls(dim)
        return cls(dim, np.frombuffer(base64.b64decode(data), "<f4").reshape(-1, dim).astype(np.float32))


def second_moment(blocks: Iterable[Vectors]) -> NDArray[np.float64]:
    """(D, D), the sum of x x^T over all vectors: all that the rotation needs, however many there are."""
    total: Any = 0.0
    for block in blocks:
        wide = block.astype(np.float64)
        total = total + wide.T @ wide
    return np.asarray(total)


def rotation_of(moment: NDArray[np.float64], dim: int) -> Vectors:
    """(D, d): the eigenvectors of the largest eigenvalues."""
    _, vectors = np.linalg.eigh(moment)
    return np.ascontiguousarray(vectors[:, ::-1][:, :dim], np.float32)


def neighbours_kept(vectors: Vectors, narrow: Callable[[Vectors], Vectors]) -> float:
    """Share of the ten nearest others that stay among the ten nearest; vectors: (n, D)."""
    some = vectors[np.linspace(0, len(vectors) - 1, min(len(vectors), _SAMPLE)).astype(int)]
    asked = np.linspace(0, len(some) - 1, min(len(some), _QUERIES)).astype(int)
    before, after = _nearest(some, asked), _nearest(narrow(some), asked)
    if not before.shape[1]:
        return 1.0
    kept = [len(set(b) & set(a)) / len(b) for b, a in zip(before.tolist(), after.tolist(), strict=True)]
    return float(np.mean(kept))


def _nearest(vectors: Vectors, asked: NDArray[np.int64]) -> NDArray[np.int64]:
    scores = vectors[asked] @ vectors.T
    scores[np.arange(len(asked)), asked] = -np.inf
    return np.argsort(-scores, axis=1, kind="stable")[:, : min(_NEIGHBOURS, len(vectors) - 1)]


def choose(moment: NDArray[np.float64], sample: Vectors, dim: int) -> tuple[Narrowing, str]:
    """The cut or the rotation, whichever keeps more neighbours of `sample` (n, D); and a line that says both."""
    ways = {"cut": Narrowing(dim), "rotation": Narrowing(dim, rotation_of(moment, dim))}
    kept = {name: neighbours_kept(sample, way) for name, way in ways.items()}
    best = max(kept, key=lambda name: kept[name])
    told = ", ".join(f"{name} {100 * share:.1f}%" for name, share in kept.items())
    return ways[best], f"of the 10 nearest neighbours stay, with {dim} of {len(moment)} numbers: {told}; taken: {best}"
