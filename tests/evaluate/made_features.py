"""Features by hand, for tasks that need no model."""

from collections.abc import Sequence

import numpy as np
import torch

from eclip.evaluate.features import Features


def make_features(
    image: torch.Tensor,
    text: torch.Tensor,
    instance: torch.Tensor | None = None,
    *,
    titles: Sequence[int] | None = None,
    products: Sequence[int] | None = None,
    sources: Sequence[str] | None = None,
) -> Features:
    """n images with embeddings (n, D); by default each a detail page with a title and a product of its own."""
    rows = np.arange(len(image))
    return Features(
        rows=rows,
        products=rows if products is None else np.array(products),
        sources=np.array(sources or ["detail"] * len(rows)),
        titles=rows if titles is None else np.array(titles),
        global_image=image,
        text=text,
        global_map=torch.zeros(len(rows), 1),
        instance_image=instance,
        instance_text=instance,
        instance_map=None,
    )
