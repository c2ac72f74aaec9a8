"""Gradient norms by part: by a plain formulation, and over ranks however gradients are spread."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from eclip.model.eclip import ECLIP
from eclip.parallel.ranks import Ranks
from eclip.training.metrics.gradients import PARTS, gradient_squares, part_of, to_norms
from tests.helpers import run_torchrun
from tests.host_waits import DEVICE, no_host_waits
from tests.model.tiny import tiny
from tests.training.run_folders import ALONE


def with_gradients(model: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
    return model


def gradient_norms(model: nn.Module, ranks: Ranks) -> dict[str, float]:
    """As a run has them: squares, their means over ranks, on the host norms of these."""
    squares = gradient_squares(model)
    if not squares:
        return {}
    means = ranks.mean(torch.stack(list(squares.values())))
    return to_norms(dict(zip(squares, means.tolist(), strict=True)))


def plain(model: nn.Module, modules: tuple[str, ...]) -> float:
    """The norm of all gradients of these modules as one vector, in float64."""
    rows = [
        p.grad.double().flatten()
        for name, p in model.named_parameters()
        if name.split(".")[0] in modules and p.grad is not None
    ]
    return float(torch.cat(rows).norm())


def test_each_part_by_a_plain_formulation() -> None:
    model = with_gradients(ECLIP(tiny()))
    norms = gradient_norms(model, ALONE)
    assert list(norms) == [f"grad_norm/{part}" for part in PARTS]
    for part, modules in PARTS.items():
        assert norms[f"grad_norm/{part}"] == pytest.approx(plain(model, modules), rel=1e-5)
    squares = gradient_squares(model)
    assert to_norms({name: float(value) for name, value in squares.items()} | {"loss": 2.0}) == pytest.approx(
        norms | {"loss": 2.0}
    )
    total = nn.utils.get_total_norm([p.grad for p in model.parameters()])
    assert math.sqrt(sum(map(float, squares.values()))) == pytest.approx(float(total), rel=1e-5)


def test_every_parameter_has_a_part() -> None:
    assert {part_of(name) for name, _ in ECLIP(tiny()).named_parameters()} == set(PARTS)
    assert part_of("fusion.0.weight") == "rest"


def test_a_locked_part_has_no_number() -> None:
    model = with_gradients(ECLIP(tiny()))
    for parameter in model.image_encoder.parameters():
        parameter.grad = None
    assert "grad_square/image_encoder" not in gradient_squares(model)
    assert gradient_norms(nn.Linear(2, 2), ALONE) == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_numbers_are_float32_and_nothing_is_waited_for(dtype: torch.dtype) -> None:
    model = with_gradients(ECLIP(tiny()).to(dtype))
    assert {x.dtype for x in gradient_squares(model).values()} == {torch.float32}
    model = ECLIP(tiny()).to(DEVICE, dtype)
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter)
    with no_host_waits():
        gradient_squares(model)


def test_a_gradient_that_is_no_number_shows() -> None:
    model = with_gradients(ECLIP(tiny()))
    assert isinstance(model.logit_scale.grad, Tensor)
    model.logit_scale.grad[0] = torch.nan
    means = {name: float(value) for name, value in gradient_squares(model).items()}
    found = to_norms(means)
    assert [name for name, value in found.items() if math.isnan(value)] == ["grad_norm/heads"]


SPREAD = """
import dataclasses, gc, sys
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from eclip.model.eclip import ECLIP
from eclip.parallel.ranks import Ranks
from eclip.parallel.sharding import shard
from tests.model.tiny import tiny
from tests.training.metrics.test_gradients import gradient_norms, with_gradients

dist.init_process_group("gloo")
world = dist.get_world_size()
found = {}
for form in ("one", "none", "full", "hybrid"):
    torch.manual_seed(0)
    model = ECLIP(tiny())
    whole = init_device_mesh("cpu", (world,))
    ranks = Ranks(rank=dist.get_rank(), world_size=world, device=torch.device("cpu"), mesh=whole)
    if form == "one":
        ranks = dataclasses.replace(ranks, mesh=None)
    with_gradients(model)
    gradients = [p.grad for p in model.parameters()]
    if form in ("full", "hybrid"):
        for p in model.parameters():
            p.grad = None
        shard(model, whole if form == "full" else init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("a", "b")))
        for p, gradient in zip(model.parameters(), gradients):
            p.grad = torch.distributed.tensor.distribute_tensor(gradient, p.device_mesh, p.placements)
    found[form] = gradient_norms(model, ranks)
    model = p = None
    gc.collect()
for form, norms in found.items():
    for name, norm in norms.items():
        assert abs(norm - found["one"][name]) <= 1e-5 * norm, (form, name, norm, found["one"][name])
assert found["one"].keys() == found["full"].keys() == found["hybrid"].keys()
if dist.get_rank() == 0:
    open(sys.argv[1], "w").write("same")
dist.destroy_process_group()
"""


def test_norms_are_the_same_however_gradients_are_spread(tmp_path: Path) -> None:
    """As of one process: whole on every rank, sharded over four, sharded inside two machines of two."""
    run_torchrun(SPREAD, str(tmp_path / "done"), ranks=4)
    assert (tmp_path / "done").read_text() == "same"
