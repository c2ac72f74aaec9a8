"""ECLIP: instance-level vision-language pretraining for e-commerce (arXiv 2304.02853 and 2207.00208).

    import eclip
    model = eclip.load("runs/demo_towers")
    model.embed_texts(["red armchair"]), model.embed_images(["photo.jpg"]), model.locate("photo.jpg", "red armchair")
"""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # `import eclip` takes no second; torch takes several
    from eclip.inference import TrainedModel

__version__ = "0.1.0"
__all__ = ["load"]


def load(
    path: str | Path,
    device: str = "auto",
    *,
    which: Literal["newest", "best"] = "newest",
    weights: Literal["model", "momentum"] = "model",
) -> "TrainedModel":
    """A trained model to use, from the folder of a run or from one that `eclip export` wrote.

    device: cpu, cuda, cuda:N, or auto for a GPU when there is one. which, weights: of a run's checkpoints the newest or
    the one with the lowest loss of the val split; the trained weights or their moving average. Raises ValueError, in
    one line, when the folder holds no model or a damaged one.
    """
    from eclip.inference import load as load_model

    return load_model(path, device, which=which, weights=weights)
