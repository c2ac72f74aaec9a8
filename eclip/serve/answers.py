"""Answers to JSON, as eclip/serve/docs.py describes them."""

from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

from eclip.inference import Region
from eclip.inference.trained import Vectors
from eclip.search.query import Answer, Hit
from eclip.serve.service import Located


def answer_json(answer: Answer) -> dict[str, Any]:
    """Of /search."""
    photo = None
    if answer.photo_size is not None:
        width, height = answer.photo_size
        photo = {"width": width, "height": height, "regions": _regions(answer.photo_regions)}
    return {
        "hits": [_hit(hit) for hit in answer.hits],
        "scored_by": answer.scored_by,
        "photo": photo,
        "seconds": {name: round(value, 4) for name, value in answer.seconds.items()},
    }


def located_json(located: Located) -> dict[str, Any]:
    """Of /locate. The map is brought to [0, 1], as it is cut into regions: its scale says nothing to a reader."""
    width, height = located.size
    scores = located.regions[0].map
    low, high = float(scores.min()), float(scores.max())
    shown = (scores - low) / (high - low) if high > low else scores * 0
    return {
        "width": width,
        "height": height,
        "grid": len(shown),
        "map": [[round(float(value), 4) for value in row] for row in shown],
        "regions": _regions(located.regions),
    }


def vectors_json(vectors: Vectors) -> dict[str, Any]:
    """Of /embed."""
    return {"vectors": vectors.tolist(), "embed_dim": vectors.shape[1]}


def _hit(hit: Hit) -> dict[str, Any]:
    told = hit.to_dict()
    # Where the image lies is the server's business; the page and its users see the thumbnail.
    del told["image"]
    return {**told, "thumbnail": f"/thumbnails/{quote(hit.id, safe='/')}"}


def _regions(regions: Sequence[Region]) -> list[dict[str, Any]]:
    return [{"box": list(region.box), "score": region.score} for region in regions]
