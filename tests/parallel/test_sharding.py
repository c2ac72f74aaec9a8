"""However a step is spread over ranks and cut into parts: its parameters, momentum model and norms are one process's.

Two gloo ranks have their share each; four are two "machines" of two, for `hybrid`.
"""

from typing import Literal

import pytest
import torch
from torch import nn

from eclip.parallel.ranks import Ranks
from eclip.parallel.settings import ComputeConfig
from eclip.parallel.sharding import last_backward, spread
from tests.helpers import run_torchrun
from tests.parallel.two_towers import Step, build

ALONE = Ranks(rank=0, world_size=1, device=torch.device("cpu"), mesh=None)

START = """
import gc, itertools, os, sys
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
os.environ |= {"LOCAL_RANK": str(rank % 2), "LOCAL_WORLD_SIZE": "2"}
import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from eclip.parallel.ranks import find_ranks, part, start_ranks
from eclip.parallel.settings import ComputeConfig
from eclip.parallel.sharding import spread
from tests.parallel.two_towers import Step, build, train, whole

ranks = start_ranks(find_ranks(timeout=60))
torch.manual_seed(1)
rows = torch.randn(3, 24, 6, dtype=torch.float64)
mine = rows.unflatten(1, (world, -1))[:, rank]

def compare(locked, parts, **settings):
    models = build(locked)
    norms = train(Step(*models), *models, rows, parts)
    spread_models = build(locked)
    module = spread(Step(*spread_models), ranks, ComputeConfig(**settings))
    for one, other in zip(train(module, *spread_models, mine, parts), norms, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=0, msg=f"norm {locked} {parts} {settings}")
    for model, expected in zip(spread_models, models, strict=True):
        for (name, a), b in zip(model.named_parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(whole(a), b, rtol=0, atol=1e-12, msg=f"{name} {locked} {parts} {settings}")
"""
END = """
gc.collect()
part(ranks)
print(f"rank {rank} done", flush=True)
"""
TWO_RANKS = """
for locked, parts, shard in itertools.product(("nothing", "image", "text", "both", "part"), (1, 3), ("none", "full")):
    compare(locked, parts, shard=shard)
    gc.collect()
compare("part", 3, shard="full", reshard=False)
compare("nothing", 2, shard="hybrid")  # one machine
"""
FOUR_RANKS = """
for locked, parts, shard in itertools.product(("nothing", "part"), (1, 3), ("hybrid", "full", "none")):
    compare(locked, parts, shard=shard)
    gc.collect()
compare("image", 3, shard="hybrid", reshard=False)
model, momentum = build("image")
step = spread(Step(model, momentum), ranks, ComputeConfig(shard="hybrid", cpu_offload=True))
assert all(isinstance(module, FSDPModule) for module in (step, *model.text.blocks, *model.image.blocks))
weight = model.text_projection.weight
assert isinstance(weight, DTensor) and weight.device_mesh.mesh.tolist() == [[0, 1], [2, 3]], weight
assert weight.to_local().shape == (2, 6)  # half of four
assert torch.distributed.get_world_size(ranks.group) == 4
del model, momentum, step, weight
"""
UNEVEN = """
os.environ["LOCAL_WORLD_SIZE"] = str(1 + rank)
import dataclasses
ranks = dataclasses.replace(ranks, local_size=1 + rank)
try:
    spread(torch.nn.Linear(2, 2), ranks, ComputeConfig(shard="hybrid"))
except ValueError as error:
    assert "(0, 1), (1, 2): it needs as many ranks on each machine" in str(error), error
    print("refused")
"""


def test_two_ranks_take_the_steps_of_one_process() -> None:
    """Also with locked towers, whose blocks are groups without a gradient (pytorch #186998)."""
    output = run_torchrun(START + TWO_RANKS + END)
    assert output.count("done") == 2
    assert output.count("--shard hybrid: there is one machine, on which it is the same as full") == 1


def test_four_ranks_on_two_machines() -> None:
    output = run_torchrun(START + FOUR_RANKS + END, ranks=4)
    assert output.count("done") == 4
    assert output.count("--cpu-offload has nothing to do: the ranks are on CPUs") == 1


def test_hybrid_needs_equal_machines() -> None:
    output = run_torchrun(START + UNEVEN + END)
    assert output.count("refused") == 2


@pytest.mark.parametrize("shard", ["none", "full", "hybrid"])
def test_alone_there_is_nothing_to_spread(
    shard: Literal["none", "full", "hybrid"], capsys: pytest.CaptureFixture[str]
) -> None:
    step = Step(*build("nothing"))
    assert spread(step, ALONE, ComputeConfig(shard=shard)) is step
    said = "--shard hybrid has nothing to do: one process has nothing to shard\n" if shard == "hybrid" else ""
    assert capsys.readouterr().out == said
    with last_backward(step, False):
        step("rows", torch.ones(4, 6, dtype=torch.float64), None, 1.0)["total"].backward()
    assert isinstance(step.model.text_projection.weight, nn.Parameter)
    if shard != "none":
        spread(step, ALONE, ComputeConfig(shard=shard, cpu_offload=True))
        assert "nothing to do: one process" in capsys.readouterr().out
        spread(step, ALONE, ComputeConfig(shard=shard, reshard=False))
        assert "--no-reshard has nothing to do: one process has nothing to shard\n" in capsys.readouterr().out


def test_without_sharding_there_is_nothing_to_gather_again() -> None:
    with pytest.raises(ValueError, match="^--no-reshard with --shard none: .*leave one of them out$"):
        ComputeConfig(shard="none", reshard=False)
