"""The peer on transformers is our model: same weights, same losses, same gradients."""

import dataclasses

import pytest
import torch

from benchmarks.train_step.batches import make_parts, pad
from benchmarks.train_step.models import random_model
from benchmarks.train_step.plain import PlainModel, PlainStep, compute_losses
from benchmarks.train_step.transfer import gradients, pairs, transfer
from eclip.config import RunConfig
from eclip.model.eclip import ECLIP
from eclip.model.settings import ModelConfig
from eclip.objectives.objective import make_objective
from eclip.objectives.settings import ObjectiveConfig
from eclip.training.momentum import make_momentum
from tests.benchmarks.train_step.small import CPU, SMALL, cached

pytest.importorskip("transformers")


def both(config: RunConfig) -> tuple[ECLIP, PlainModel]:
    """In float64, with every weight away from where it starts: biases and norms count too."""
    ours = random_model(config, CPU).double()
    numbers = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in ours.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=numbers, dtype=p.dtype))
    plain = PlainModel(config.model, image_tower=not config.cache_features, text_tower=not config.lock_text).double()
    transfer(ours, plain)
    return ours, plain.train()


def pair_of_losses(config: RunConfig, ours: ECLIP, plain: PlainModel) -> tuple[dict, dict]:
    objective = make_objective(config.objective)
    (part,) = make_parts(config, CPU)
    if part.cached is not None:
        part = dataclasses.replace(part, cached=part.cached.map(torch.Tensor.double))
    momentum, plain_momentum = (
        make_momentum(ours),
        PlainModel(config.model, image_tower=not config.cache_features, text_tower=not config.lock_text),
    )
    with torch.no_grad():
        for m, p in zip(momentum.parameters(), ours.parameters(), strict=True):
            if m is not p:  # a momentum model that lags
                m.mul_(0.9)
    transfer(momentum, plain_momentum.double().requires_grad_(False).eval())
    mine = objective.losses(ours, momentum, part.batch, part.draws, cached=part.cached)
    return mine, compute_losses(plain, plain_momentum, pad(part), config.objective)


RANDOM = ObjectiveConfig(
    own_image_share=0.4, gaussian_share=0.4, inter_weight=2.0, intra_weight=0.5, entropy_weight=0.1
)


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        dataclasses.replace(SMALL, objective=RANDOM, global_batch_size=9),
        dataclasses.replace(
            SMALL, model=dataclasses.replace(SMALL.model, text_pooling="mean", pixel_statistics="half")
        ),
        cached(SMALL),
        dataclasses.replace(cached(SMALL), objective=RANDOM),
    ],
    ids=["default", "every draw", "mean pooling", "cached", "cached, every draw"],
)
def test_the_peer_has_our_losses_and_gradients(config: RunConfig) -> None:
    ours, plain = both(config)
    mine, theirs = pair_of_losses(config, ours, plain)
    for name, value in theirs.items():
        assert value.item() == pytest.approx(mine[name].item(), rel=1e-9), name
    mine["loss"].backward()
    theirs["loss"].backward()
    compared = 0
    for found, wanted in gradients(ours, plain):
        torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-10)
        compared += 1
    trained = [theirs for theirs, wanted, _ in pairs(ours, plain) if wanted.requires_grad]
    assert compared == len(trained) > 30, "a parameter has a gradient in one of the two only"


def test_every_parameter_of_the_peer_is_one_of_ours() -> None:
    ours, plain = both(SMALL)
    mapped = {id(p) for p, _, _ in pairs(ours, plain)}
    left = [name for name, p in plain.named_parameters() if id(p) not in mapped]
    assert left == ["text.embeddings.token_type_embeddings.weight"]


def test_a_step_of_the_peer_learns_and_moves_its_momentum_model() -> None:
    config = dataclasses.replace(SMALL, optim=dataclasses.replace(SMALL.optim, learning_rate=2e-3))
    step = PlainStep(config, CPU)
    (part,) = make_parts(config, CPU)
    batch = pad(part)
    before = [p.clone() for p in step.momentum.parameters()]
    losses = [step(batch)["loss"].item() for _ in range(8)]
    assert losses[-1] < losses[0]
    moved = [not torch.equal(a, b) for a, b in zip(before, step.momentum.parameters(), strict=True)]
    assert all(p.grad is None for p in step.momentum.parameters())
    assert sum(moved) > 0.9 * len(moved)


def test_the_small_model_is_small() -> None:
    assert isinstance(SMALL.model, ModelConfig)
    assert sum(p.numel() for p in random_model(SMALL, CPU).parameters()) < 100_000
