"""Rankings: images of one product folded into one, and two rankings fused."""

from collections.abc import Sequence
from dataclasses import dataclass

RANK_OFFSET = 60
"""k of reciprocal rank fusion, as its authors set it (Cormack, Clarke and Buettcher, SIGIR 2009)."""


@dataclass(frozen=True)
class Candidate:
    """A row of the table and how well it answers."""

    row: int
    """LanceDB's row id."""
    product: str
    score: float
    """Larger is better."""


def fold(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The first candidate of every product; candidates come best first."""
    best: dict[str, Candidate] = {}
    for candidate in candidates:
        best.setdefault(candidate.product, candidate)
    return list(best.values())


def fuse(first: Sequence[Candidate], second: Sequence[Candidate], *, by_product: bool) -> list[Candidate]:
    """Reciprocal rank fusion: the sum of 1 / (60 + rank) over the rankings that have it, best first.

    by_product: both are folded, and what stands in both is shown by the image that the first has. LanceDB's own
    reranker fuses images; all images of a product have one title, so that their ranks by full text would be arbitrary.
    """
    fused: dict[str | int, Candidate] = {}
    for ranking in (first, second):
        for rank, candidate in enumerate(ranking, start=1):
            key = candidate.product if by_product else candidate.row
            known = fused.get(key)
            score = 1 / (RANK_OFFSET + rank)
            if known is None:
                fused[key] = Candidate(candidate.row, candidate.product, score)
            else:
                fused[key] = Candidate(known.row, known.product, known.score + score)
    return sorted(fused.values(), key=lambda candidate: -candidate.score)
