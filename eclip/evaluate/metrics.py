"""Metric functions and their exact values under chance: no model, no data set.

Letters: Q queries, M gallery items, K depth of a ranking, P positives of a query among the M.

Chance is never sampled: a random ranking draws its first K items without replacement, so the number of hits among
them is hypergeometric and every expectation below is a finite sum.
"""

import functools
import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

RANKS = (1, 5, 10)
_NO_MATCH = "no query has a match in the gallery: retrieval scores are undefined"


def average_precision(hits: NDArray[np.bool_], positives: NDArray[np.int64], k: int) -> NDArray[np.float64]:
    """AP@k as Product1M's scoring script counts it.

    hits: (Q, K) bool, K >= min(k, M), best rank first; positives: (Q,) P of each query (those beyond rank K too).
    topk = min(k, P, K); AP = sum of precision at the hits of the first topk ranks / number of those hits, 0 without
    one. So AP@1 is precision at 1, and a query with one positive is judged by rank 1 alone. Returns (Q,).
    """
    depth = np.minimum(np.minimum(k, positives), hits.shape[1])
    ranks = np.arange(1, hits.shape[1] + 1)
    counted = hits & (ranks[None] <= depth[:, None])
    precision = np.cumsum(counted, axis=1) / ranks
    return np.asarray((precision * counted).sum(1) / np.maximum(counted.sum(1), 1))


def hit_at(hits: NDArray[np.bool_], k: int) -> NDArray[np.float64]:
    """R@k of each query: 1 where a positive stands among the first k ranks. hits: (Q, K). Returns (Q,)."""
    return np.asarray(hits[:, :k].any(1), dtype=np.float64)


@functools.cache
def expected_average_precision(positives: int, gallery: int, k: int, total: int | None = None) -> float:
    """AP@k (see `average_precision`) of a random ranking of `gallery` items, `positives` of them right.

    total: the P that AP@k counts, where the items are an excerpt of the gallery that holds some of the positives only.
    Given h hits in the first n = min(k, P, M) ranks, the hit ranks are a uniform h-subset of 1..n, so that
    E[AP | h] = 1/n * sum_i 1/i * (1 + (i-1)(h-1)/(n-1)); h is hypergeometric.
    """
    n = min(k, positives if total is None else total, gallery)
    harmonic = [1.0 / i for i in range(1, n + 1)]
    expected = 0.0
    for h in range(max(1, n - (gallery - positives)), min(n, positives) + 1):
        others = (h - 1) / (n - 1) if n > 1 else 0.0  # chance that another given rank is a hit too
        given = sum(inverse * (1 + i * others) for i, inverse in enumerate(harmonic)) / n
        expected += _hypergeometric(h, positives, gallery, n) * given
    return expected


@functools.cache
def expected_hit(positives: int, gallery: int, k: int) -> float:
    """R@k of a random ranking: 1 - probability that all first k items are wrong."""
    return 1.0 - _hypergeometric(0, positives, gallery, min(k, gallery))


def _hypergeometric(hits: int, positives: int, gallery: int, draws: int) -> float:
    """Probability of `hits` positives among `draws` items drawn without replacement (exact until the ratio)."""
    return math.comb(positives, hits) * math.comb(gallery - positives, draws - hits) / math.comb(gallery, draws)


def top_matches(queries: Tensor, gallery: Tensor, k: int, *, chunk: int = 1024) -> NDArray[np.int64]:
    """The k gallery rows most similar to each query, best first.

    queries: (Q, D); gallery: (M, D); compared by dot product, `chunk` queries at a time (chunk x M floats of memory).
    The gallery is ranked in a fixed shuffled order: equal scores then fall in no order that knows the labels, and
    constant embeddings score as chance does. Returns (Q, min(k, M)). Raises ValueError for NaN and infinity: one such
    row would stand first for every query.
    """
    for name, embeddings in (("queries", queries), ("gallery", gallery)):
        if bad := int((~embeddings.isfinite().all(-1)).sum()):
            raise ValueError(f"{bad} of {len(embeddings)} {name} are not finite: they cannot be ranked")
    order = torch.randperm(len(gallery), generator=torch.Generator().manual_seed(0))
    shuffled = gallery[order]
    found = [order[(part @ shuffled.T).topk(min(k, len(gallery))).indices] for part in queries.split(chunk)]
    return torch.cat(found).numpy() if found else np.zeros((0, min(k, len(gallery))), dtype=np.int64)


def retrieval_scores(
    queries: Tensor,
    gallery: Tensor,
    query_labels: NDArray[np.int64],
    gallery_labels: NDArray[np.int64],
    *,
    average: bool,
) -> dict[str, float]:
    """Mean over queries of R@k, and of mAP@k with `average`, k in RANKS; a match has an equal label.

    queries: (Q, D); gallery: (M, D); labels: (Q,), (M,). Queries without any match in the gallery are left out (the
    caller counts them with `count_positives`). Raises ValueError when no query has a match, or for NaN and infinity.
    """
    kept = count_positives(query_labels, gallery_labels) > 0
    if not kept.any():
        raise ValueError(_NO_MATCH)
    found = top_matches(queries[torch.from_numpy(kept)], gallery, max(RANKS))
    return ranking_scores(found, query_labels[kept], gallery_labels, average=average)


def ranking_scores(
    found: NDArray[np.int64],
    query_labels: NDArray[np.int64],
    gallery_labels: NDArray[np.int64],
    *,
    average: bool,
) -> dict[str, float]:
    """`retrieval_scores` of given rankings: found (Q, K) gallery rows, best first, K >= min(max(RANKS), M)."""
    positives = count_positives(query_labels, gallery_labels)
    kept = positives > 0
    if not kept.any():
        raise ValueError(_NO_MATCH)
    hits = gallery_labels[found[kept]] == query_labels[kept][:, None]
    scores = {f"R@{k}": float(hit_at(hits, k).mean()) for k in RANKS}
    if average:
        scores = {f"mAP@{k}": float(average_precision(hits, positives[kept], k).mean()) for k in RANKS} | scores
    return scores


def shuffled_scores(
    found: NDArray[np.int64], query_labels: NDArray[np.int64], gallery_labels: NDArray[np.int64]
) -> dict[str, float]:
    """What `ranking_scores` gives in expectation, mAP included, when each query's (Q, K) items are put in random order.

    Exact: chance for whoever orders what another one found. Raises ValueError as it does.
    """
    positives = count_positives(query_labels, gallery_labels)
    kept = positives > 0
    if not kept.any():
        raise ValueError(_NO_MATCH)
    held = (gallery_labels[found[kept]] == query_labels[kept][:, None]).sum(1)
    pairs = [(int(h), int(p)) for h, p in zip(held, positives[kept], strict=True)]
    size = found.shape[1]
    expected = {k: np.mean([expected_average_precision(h, size, k, p) for h, p in pairs]) for k in RANKS}
    hit = {k: np.mean([expected_hit(h, size, k) for h, _ in pairs]) for k in RANKS}
    return {f"mAP@{k}": float(v) for k, v in expected.items()} | {f"R@{k}": float(v) for k, v in hit.items()}


def chance_scores(
    query_labels: NDArray[np.int64], gallery_labels: NDArray[np.int64], *, average: bool
) -> dict[str, float]:
    """What `retrieval_scores` gives in expectation for a random ranking: exact. Raises ValueError as it does."""
    positives = [int(p) for p in count_positives(query_labels, gallery_labels) if p > 0]
    if not positives:
        raise ValueError(_NO_MATCH)
    size = len(gallery_labels)
    scores = {f"R@{k}": float(np.mean([expected_hit(p, size, k) for p in positives])) for k in RANKS}
    if average:
        expected = {k: np.mean([expected_average_precision(p, size, k) for p in positives]) for k in RANKS}
        scores = {f"mAP@{k}": float(v) for k, v in expected.items()} | scores
    return scores


def count_positives(query_labels: NDArray[np.int64], gallery_labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """(Q,) number of gallery items that carry each query's label."""
    labels, counts = np.unique(gallery_labels, return_counts=True)
    at = np.clip(np.searchsorted(labels, query_labels), 0, max(len(labels) - 1, 0))
    return np.where(labels[at] == query_labels, counts[at], 0) if len(labels) else np.zeros(len(query_labels), np.int64)
