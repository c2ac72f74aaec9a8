"""What the tasks compare: features of a split's images and the facts that label them.

Letters: n images, D embedding width, N patch tokens. Per image: the global feature g_I(v_cls), the feature g_T(w_cls)
of its own title, the instance embedding prompted by each of the two, and two score maps for "where is what the title
names": the decoder's assignment of patches to the title's query, and (CLIP's usual way) the cosine of patch and title.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor


@dataclass(kw_only=True)
class Prompted:
    """p of the images, each prompted by the title of another product that it shows (`Extras.prompts`)."""

    rows: NDArray[np.int64]
    """(p,) rows of the shard index, ascending."""
    products: NDArray[np.int64]
    """(p,) positions of the products whose titles these are."""
    text: Tensor
    """(p, D) feature of that title, L2-normalised."""
    instance: Tensor | None
    """(p, D) instance embedding prompted by it; None without a trained decoder."""


@dataclass(kw_only=True)
class Features:
    """Features of n images (CPU, float32, embeddings L2-normalised) and the facts that label them.

    Memory: 4 n (4 D + 2 N) bytes, 4 KiB an image at D=192, N=64 and 14 KiB at D=768, N=196; 2 N D for each image whose
    tokens are kept.
    """

    rows: NDArray[np.int64]
    """(n,) rows of the shard index, ascending."""
    products: NDArray[np.int64]
    """(n,) positions of the products in the index."""
    sources: NDArray[np.str_]
    """(n,) members of schema.SOURCES."""
    titles: NDArray[np.int64]
    """(n,) equal where the titles are equal."""
    global_image: Tensor
    """(n, D)."""
    text: Tensor
    """(n, D) feature of the image's own title."""
    global_map: Tensor
    """(n, N) cosine of each projected patch token with the title."""
    instance_image: Tensor | None
    """(n, D) instance embedding prompted by the image's own global feature; None without a trained decoder."""
    instance_text: Tensor | None
    """(n, D) instance embedding prompted by the title."""
    instance_map: Tensor | None
    """(n, N) share of each patch token that the title's query takes from the T-1 others."""
    prompted: Prompted | None = None
    """Some of the images, prompted by other titles than their own; None where none was asked for."""
    tokens: Mapping[int, Tensor] = field(default_factory=dict)
    """Row -> (N, D) float16, projected patch tokens of the few images that they are kept of (`Extras.tokens`)."""

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, keep: NDArray[np.bool_] | NDArray[np.int64]) -> "Features":
        """The same features for some of the images; `prompted` and `tokens`, which name their rows, as they are."""
        chosen = torch.from_numpy(np.flatnonzero(keep) if keep.dtype == bool else keep)
        picked: dict[str, Any] = {
            name: value[chosen] if isinstance(value, Tensor) else value[chosen.numpy()]
            for name, value in vars(self).items()
            if isinstance(value, Tensor | np.ndarray)
        }
        return replace(self, **picked)

    def embeddings(self) -> dict[str, Tensor]:
        """The rows of the tables: name -> (n, D), L2-normalised.

        The text enters the instance embedding only as prompt (its content is visual) and the global one by addition;
        "instance + text" adds the title to the instance embedding in the same way, for a comparison of equals.
        """
        both = None if self.instance_text is None else F.normalize(self.instance_text + self.text, dim=-1)
        found: dict[str, Tensor | None] = {
            "instance (image)": self.instance_image,
            "global (image)": self.global_image,
            "instance (image+text)": self.instance_text,
            "instance + text": both,
            "global (image+text)": F.normalize(self.global_image + self.text, dim=-1),
            "text only": self.text,
        }
        return {name: value for name, value in found.items() if value is not None}

    def image_embeddings(self) -> dict[str, Tensor]:
        """name -> (n, D): what stands for the image alone where it is compared with texts."""
        found = {"instance": self.instance_image, "global": self.global_image}
        return {name: value for name, value in found.items() if value is not None}

    def score_maps(self) -> dict[str, Tensor]:
        """name -> (n, N) score maps for grounding."""
        found = {"instance": self.instance_map, "global": self.global_map}
        return {name: value for name, value in found.items() if value is not None}
