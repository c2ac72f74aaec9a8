"""A small model with everything that spreading a step has to get right, in float64.

Two towers with blocks, of which some may be locked; a momentum model that shares what is locked; a step of several
calls, without gradient (a dataclass comes back) and with it.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from eclip.parallel.sharding import last_backward


class Tower(nn.Module):
    """(B, 6) -> (B, 6)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 6)
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.norm = nn.LayerNorm(6)
        self.position = nn.Parameter(torch.linspace(-1, 1, 6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x) + self.position
        for block in self.blocks:
            x = x + block(x).tanh()
        return self.norm(x)


class TwoTowers(nn.Module):
    """(B, 6) -> two of (B, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = Tower(), Tower()
        self.image_projection, self.text_projection = nn.Linear(6, 4), nn.Linear(6, 4)
        self.scale = nn.Parameter(torch.ones(1))

    def features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.image_projection(self.image(x)), self.text_projection(self.text(x.flip(1)))


@dataclass(frozen=True)
class Kept:
    """What a call without gradient leaves for one with it."""

    image: Tensor
    text: Tensor


class Step(nn.Module):
    """The root: its forward is called with a stage's name first."""

    def __init__(self, model: TwoTowers, momentum: TwoTowers) -> None:
        super().__init__()
        self.model, self.momentum = model, momentum

    def forward(self, stage: str, *inputs: Any) -> Any:
        return getattr(self, stage)(*inputs)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Kept:
        self.model.features(x)
        return Kept(*self.momentum.features(x))

    def rows(self, x: Tensor, kept: Kept | None, share: float) -> dict[str, Tensor]:
        image, text = self.model.features(x)
        loss = ((image - text.roll(1, 1)) * self.model.scale).square().mean() + (image * text).sin().mean()
        if kept is not None:
            loss = loss + (image - kept.image).square().mean() + (text - kept.text).abs().mean()
        return {"total": share * loss, "loss": loss.detach()}


def build(locked: str) -> tuple[TwoTowers, TwoTowers]:
    """Model, momentum model. locked: "nothing", "image", "text", "both", or "part": the image tower but for its top."""
    torch.manual_seed(0)
    model = TwoTowers().double()
    if locked in ("image", "both", "part"):
        model.image.requires_grad_(False)
    if locked in ("text", "both"):
        model.text.requires_grad_(False)
    if locked == "part":
        model.image.blocks[-1].requires_grad_(True)
        model.image.norm.requires_grad_(True)
    shared: Any = {id(p): p for p in model.parameters() if not p.requires_grad}
    shared |= {id(m): m for m in model.modules() if not any(p.requires_grad for p in m.parameters())}
    return model, copy.deepcopy(model, memo=shared).requires_grad_(False)


def train(call: nn.Module, model: TwoTowers, momentum: TwoTowers, steps: Tensor, parts: int) -> list[Tensor]:
    """Steps on (S, B, 6), each in so many parts of equal size; `call` is Step or what wraps it. Gradient norms."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    norms = []
    for rows in steps:
        chunks = rows.chunk(parts)
        kept = [call("encode", chunk) for chunk in chunks]
        for number, (chunk, own) in enumerate(zip(chunks, kept, strict=True)):
            with last_backward(call, number == parts - 1):
                call("rows", chunk, own, 1 / parts)["total"].backward()
        norms.append(whole(nn.utils.clip_grad_norm_(trained, 0.5)))
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for slow, fast in zip(momentum.parameters(), model.parameters(), strict=True):
                if slow is not fast:
                    _local(slow).lerp_(_local(fast), 0.1)
    return norms


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def _local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x
