"""Is a product really of the colour its record names? A title says so only when it can be seen.

The catalogue names the colour of one material; on some models that material is a cap, a plinth or a back panel. The
share of pixels that pass for the named colour tells those apart. Regions overlap on purpose: a shaded white is a gray.
"""

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

SEEN = 0.25
"""A colour counts as seen from this share of the product's pixels; 32 of 394 SKUs fall short, a brown barrel first."""

_Region = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]

# Hue in degrees, saturation and value in 0..1.
_REGIONS: dict[str, _Region] = {
    "white": lambda h, s, v: (s < 0.18) & (v > 0.6),
    "black": lambda h, s, v: v < 0.3,
    "gray": lambda h, s, v: (s < 0.25) & (v > 0.15) & (v < 0.88),
    "beige": lambda h, s, v: (v > 0.4) & (((h < 70) | (h > 330)) & (s < 0.55) & (s > 0.05) | (s < 0.15) & (v > 0.6)),
    "brown": lambda h, s, v: ((h < 50) | (h > 340)) & (s > 0.2) & (v < 0.75),
    "red": lambda h, s, v: ((h < 20) | (h > 335)) & (s > 0.4),
    "orange": lambda h, s, v: (h > 8) & (h < 48) & (s > 0.4) & (v > 0.4),
    "yellow": lambda h, s, v: (h > 38) & (h < 72) & (s > 0.25) & (v > 0.4),
    "green": lambda h, s, v: (h > 65) & (h < 175) & (s > 0.15),
    "blue": lambda h, s, v: (h > 175) & (h < 265) & (s > 0.15),
    "purple": lambda h, s, v: (h > 250) & (h < 325) & (s > 0.15),
    "pink": lambda h, s, v: ((h > 295) | (h < 15)) & (s > 0.12) & (v > 0.5),
}
# Neighbours that light or a colour cast can turn into each other.
_NEAR = (
    "white gray beige",
    "gray black",
    "black brown",
    "beige brown yellow",
    "brown orange red",
    "red pink",
    "orange yellow",
    "purple pink",
    "blue purple",
)
_NEAR_PAIRS = {(a, b) for group in _NEAR for a in group.split() for b in group.split()}


def colour_share(views: Sequence[Image.Image], colour: str) -> float:
    """Mean over RGBA views of the share of their pixels that pass for `colour` (one of the catalogue's twelve)."""
    shares = []
    for view in views:
        small = view.reduce(2)
        mine = np.asarray(small.getchannel("A")) >= 128
        hue, saturation, value = (np.asarray(small.convert("RGB").convert("HSV"), np.float32)[mine] / 255).T
        shares.append(float(_REGIONS[colour](360 * hue, saturation, value).mean()) if mine.any() else 0.0)
    return float(np.mean(shares))


def distinct(a: str, b: str) -> bool:
    """Whether two colour names cannot be mistaken for each other in a photo."""
    return a != b and (a, b) not in _NEAR_PAIRS
