"""Compiled blocks against those as they are: the same gradients, no break in a block, no new graph for other texts.

The backend is aot_eager: traced and differentiated ahead as for Inductor, but not turned into machine code, which takes
minutes on a CPU.
"""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from eclip.model.eclip import ECLIP
from eclip.parallel.compiling import compile_blocks
from eclip.parallel.recompute import checkpoint_activations
from tests.helpers import run_torchrun
from tests.model.test_device_reads import everything, inputs
from tests.model.tiny import tiny


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def step(model: ECLIP, given: tuple[Tensor, ...], longest: int) -> list[Tensor]:
    model.zero_grad()
    everything(model, given, longest=longest).backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("mode", ["none", "selective"])
def test_gradients_are_the_same_and_blocks_are_whole(mode: str) -> None:
    torch.manual_seed(0)
    plain = ECLIP(tiny()).double()
    compiled = copy.deepcopy(plain)
    checkpoint_activations(compiled, mode)
    assert compile_blocks(compiled, backend="aot_eager") == 2 + 2 + 3
    assert list(compiled.state_dict()) == list(plain.state_dict())
    given = inputs("cpu")
    assert all(map(torch.equal, step(compiled, given, 7), step(plain, given, 7)))
    graphs = counters["stats"]["unique_graphs"]
    assert graphs == 2 + 3, "one a tower; the decoder's first block starts at zero, its last exports the map"
    tokens, _, *rest = given
    others = torch.tensor([0, 2, 3, 4, 9], dtype=torch.int32)
    given = (tokens[:9], others, *rest)
    assert all(map(torch.equal, step(compiled, given, 5), step(plain, given, 5)))
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]


def test_a_copy_is_not_compiled() -> None:
    model = ECLIP(tiny())
    compile_blocks(model, backend="aot_eager")
    block = copy.deepcopy(model).image_encoder.blocks[0]
    with torch.no_grad():
        model.image_encoder.blocks[0].mlp.fc1.weight.fill_(torch.nan)
    assert block(torch.randn(1, 3, 32)).isfinite().all()
    assert not counters["stats"]


RANKS = """
import gc
import torch
from torch._dynamo.utils import counters
from eclip.parallel.compiling import compile_blocks
from eclip.parallel.ranks import find_ranks, part, start_ranks
from eclip.parallel.recompute import checkpoint_activations
from eclip.parallel.settings import ComputeConfig
from eclip.parallel.sharding import spread
from tests.model.test_device_reads import everything, inputs
from tests.parallel.test_recompute import make

class Root(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, given):
        return everything(self.model, given, longest=7)

def gradients(compiled):
    model = make()
    checkpoint_activations(model, "blocks")
    if compiled:
        compile_blocks(model, backend="aot_eager")
    root = spread(Root(model), ranks, ComputeConfig())
    torch.manual_seed(ranks.rank)
    given = inputs("cpu")
    for _ in range(2):
        for p in model.parameters():
            p.grad = None
        root(given).backward()
    return [getattr(p.grad, "full_tensor", lambda: p.grad)() for p in model.parameters()]

ranks = start_ranks(find_ranks(timeout=60))
assert all(map(torch.equal, gradients(True), gradients(False)))
assert counters["stats"]["unique_graphs"] == 5 and not counters["graph_break"], counters
gc.collect()
if ranks.is_main:
    print("same", flush=True)
part(ranks)
"""


def test_under_sharding() -> None:
    """FSDP2 gathers parameters around a compiled block, which is recomputed as well."""
    assert "same" in run_torchrun(RANKS, timeout=240)


@pytest.mark.gpu
def test_machine_code_computes_the_same() -> None:
    torch.manual_seed(0)
    plain = ECLIP(tiny()).cuda()
    compiled = copy.deepcopy(plain)
    compile_blocks(compiled)
    given = inputs("cuda")
    torch.testing.assert_close(step(compiled, given, 7), step(plain, given, 7), rtol=1e-3, atol=1e-4)
