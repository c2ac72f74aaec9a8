"""A training step as a call, for every provider: ours as the trainer takes it, with every option, and its peers.

    ours       eclip's trainer without its loader: losses, backward, clip, optimizer, momentum model
    reference  the same with --kernels reference: our ops in plain PyTorch, fp32 inside
    plain      the model written on transformers (plain.py)
    open_clip  CLIP's ViT-B-16 as open_clip trains it: other, smaller work (open_clip_step.py)

Data and random draws lie on the device already for all of them: what feeding costs is another benchmark's matter.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.train_step.batches import make_parts, pad
from benchmarks.train_step.models import random_model
from benchmarks.train_step.open_clip_step import OpenClipStep
from benchmarks.train_step.plain import PlainStep
from eclip.config import RunConfig
from eclip.parallel.ranks import Ranks
from eclip.parallel.sharding import last_backward
from eclip.training.accumulation import accumulate
from eclip.training.compute import apply_compute
from eclip.training.flight import InFlight
from eclip.training.momentum import make_momentum, update_momentum
from eclip.training.optim import build_optimizer, set_learning_rate, step_if_finite
from eclip.training.step import Part, TrainStep

PROVIDERS = ("ours", "reference", "plain", "open_clip")
Step = Callable[[], Any]


def make_step(provider: str, config: RunConfig, device: torch.device) -> Step:
    """A call that takes one step of `config` on random data. Raises ImportError where a peer's package is missing."""
    if provider == "open_clip":
        return OpenClipStep(config, device)
    if provider == "plain":
        peer = PlainStep(config, device)
        (part,) = make_parts(dataclasses.replace(config, micro_batch=None), device)
        return partial(peer, pad(part))
    if provider == "reference":
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, kernels="reference"))
    elif provider != "ours":
        raise ValueError(f"provider={provider!r}; choose one of {', '.join(PROVIDERS)}")
    return partial(OurStep(config, device), make_parts(config, device))


class OurStep:
    """What a Trainer does in a step, and how it sets up its model, on one device and without data, files or log."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self.config = config
        ranks = Ranks(rank=0, world_size=1, device=device, mesh=None)
        self.model = random_model(config, device)
        momentum = make_momentum(self.model)
        self.momentum, self.module = momentum, TrainStep(self.model, momentum, config, ranks).train()
        self.call, _ = apply_compute(self.module, config, ranks)
        self.optimizer = build_optimizer(self.model, config.optim)
        set_learning_rate(self.optimizer, config.optim.learning_rate)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.in_flight, self.step = InFlight(), 0

    def __call__(self, parts: list[Part]) -> dict[str, Tensor]:
        """One step; its losses, on the device."""
        losses = self.losses_and_gradients(parts)
        norm = nn.utils.clip_grad_norm_(self.trained, self.config.optim.clip_norm)
        numbers = torch.stack([value.float().reshape(()) for value in [*losses.values(), norm]])
        finite = self.in_flight.send(self.step, [], 0.0, [*losses, "grad_norm"], numbers, numbers.clone())
        step_if_finite(self.optimizer, finite)
        self.model.clamp_logit_scale()
        self.optimizer.zero_grad(set_to_none=True)
        update_momentum(self.model, self.momentum, self.config.objective.ema_momentum, finite=finite)
        self.step += 1
        list(self.in_flight.arrived(everything=False))
        return losses

    def losses_and_gradients(self, parts: list[Part]) -> dict[str, Tensor]:
        if len(parts) > 1:
            return accumulate(self.module, self.call, parts, partial(last_backward, self.call))
        losses: dict[str, Tensor] = self.call("losses", parts[0])
        losses["loss"].backward()
        return {name: loss.detach() for name, loss in losses.items()}
