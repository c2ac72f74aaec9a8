"""Where g_I, g_T and the logit scale start when both towers were trained together, as a CLIP's or SigLIP's were.

A CLIP has two projections into one space, and its scale. A SigLIP has none: what its towers give is compared as it is.
A random g_I and a random g_T would take apart what the towers have learnt to bring together.
"""

import torch
from torch import nn

from eclip.model.eclip import ECLIP
from eclip.weights.pretrained import Loaded


@torch.no_grad()
def start_projections(model: ECLIP, image: Loaded | None, text: Loaded | None) -> list[str]:
    """Start g_I, g_T and the scale of a new model where the files of its towers left theirs. Returns what was done.

    Without such a file, and where the dimensions are others, they stay as they are. Our projections have a bias: it
    starts at zero.
    """
    if image is not None and text is not None and image.architecture == text.architecture == "siglip":
        return [_start_equal(model)]
    sides = (("g_I", image, model.image_projection), ("g_T", text, model.text_projection))
    lines = [_start(name, loaded, projection) for name, loaded, projection in sides if loaded is not None]
    taken = all(
        loaded is not None and loaded.projection is not None and loaded.projection.shape == projection.weight.shape
        for _, loaded, projection in sides
    )
    scale = image.logit_scale if image is not None else None
    same = text is not None and scale is not None and text.logit_scale is not None and scale.equal(text.logit_scale)
    if taken and same and scale is not None and text is not None:
        model.logit_scale.copy_(scale)
        model.clamp_logit_scale()
        lines.append(f"the logit scale starts at {model.scale().item():.1f}, the logit_scale of {text.path}")
    return [line for line in lines if line]


def _start(name: str, loaded: Loaded, projection: nn.Linear) -> str:
    """What was done, or nothing to say of a tower that never had one."""
    if loaded.projection is None:
        if loaded.architecture in ("clip", "siglip"):
            return f"{name} starts anew: {loaded.path} has no projection of its own"
        return ""
    if loaded.projection.shape != projection.weight.shape:
        dimensions = len(loaded.projection)
        return (
            f"{name} starts anew: {loaded.projection_name} of {loaded.path} leads to {dimensions} dimensions, not to "
            f"embed_dim={projection.out_features}; --embed-dim {dimensions} takes it"
        )
    projection.weight.copy_(loaded.projection)
    projection.bias.zero_()
    return f"{name} starts as {loaded.projection_name} of {loaded.path}"


def _start_equal(model: ECLIP) -> str:
    """One matrix for both, the identity where it fits, so that image and text stay comparable."""
    ours, theirs = model.image_projection, model.text_projection
    if ours.in_features != theirs.in_features:
        return "SigLIP has no projections: g_I and g_T start anew, for its towers are of two widths"
    if ours.in_features == ours.out_features:
        nn.init.eye_(ours.weight)
    theirs.weight.copy_(ours.weight)
    what = "the identity" if ours.in_features == ours.out_features else "one orthogonal matrix"
    advice = "" if what == "the identity" else f" (--embed-dim {ours.in_features} starts them as the identity)"
    return f"SigLIP has no projections: g_I and g_T both start as {what}{advice}; the logit scale starts anew"
