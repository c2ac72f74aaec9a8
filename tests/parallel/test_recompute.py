"""Activation checkpointing against a plain step: the same gradients to the bit, less kept, names as they were."""

import copy
import gc

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from eclip.model.eclip import ECLIP
from eclip.parallel.recompute import checkpoint_activations
from tests.helpers import run_torchrun
from tests.model.test_device_reads import everything, inputs
from tests.model.tiny import tiny

MODES = ["blocks", "selective"]


class Alive(TorchDispatchMode):
    """Sees every tensor that is computed, and which of them are still held."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[StorageWeakRef, int]] = []
        self.calls: list[str] = []
        self.kept = 0
        """Bytes."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append(func.name().split(".")[0])
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self.made.append((StorageWeakRef(x.untyped_storage()), x.untyped_storage().nbytes()))
        return out

    def bytes(self) -> int:
        gc.collect()
        return sum({ref.cdata: size for ref, size in self.made if not ref.expired()}.values())


def make(**changes: object) -> ECLIP:
    torch.manual_seed(0)
    return ECLIP(tiny(vision_depth=4, layer_scale=True, **changes)).double()


def step(model: ECLIP, *, autocast: bool = False, cached: bool = True) -> Alive:
    """Forward, twice as a step on two views is, and backward; what the forward passes computed and left.

    cached: a weight is cast once for both passes, so that their gradients are summed in bfloat16.
    """
    given = inputs("cpu")
    with Alive() as seen, torch.autocast("cpu", torch.bfloat16, enabled=autocast, cache_enabled=cached):
        loss = everything(model, given, longest=7) + everything(model, given, longest=9)
    seen.kept = seen.bytes()
    with seen:
        loss.backward()
    return seen


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("slot_heads", [1, 8])
@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_are_the_same_and_less_is_kept(mode: str, slot_heads: int, autocast: bool) -> None:
    torch.manual_seed(1)
    plain = make(slot_heads=slot_heads)
    plain = plain.float() if autocast else plain
    lean = copy.deepcopy(plain)
    assert checkpoint_activations(lean, mode) == 4 + 2 + 3
    assert list(lean.state_dict()) == list(plain.state_dict())
    torch.manual_seed(2)
    before = step(plain, autocast=autocast, cached=mode != "selective")
    torch.manual_seed(2)
    after = step(lean, autocast=autocast)
    for name, p in plain.named_parameters():
        assert torch.equal(lean.get_parameter(name).grad, p.grad), name
    assert after.kept < {"blocks": 0.6, "selective": 0.85}[mode] * before.kept
    for name in ("aten::addmm", "aten::_scaled_dot_product_flash_attention_for_cpu", "eclip::slot_attention"):
        assert (after.calls.count(name) == before.calls.count(name)) == (mode == "selective"), name
    assert after.calls.count("aten::gelu") == 2 * before.calls.count("aten::gelu")


@pytest.mark.parametrize("mode", MODES)
def test_without_gradient_nothing_changes(mode: str) -> None:
    model, given = make(), inputs("cpu")
    with torch.no_grad():
        with Alive() as before:
            expected = everything(model, given, longest=7)
        checkpoint_activations(model, mode)
        with Alive() as after:
            found = everything(model, given, longest=7)
    assert torch.equal(found, expected)
    assert after.calls == before.calls


def test_blocks_that_do_not_train_are_left_alone() -> None:
    model = make()
    model.image_encoder.requires_grad_(False)
    assert checkpoint_activations(model, "none") == 0
    assert checkpoint_activations(model, "selective") == 2 + 3
    assert "forward" not in vars(model.image_encoder.blocks[0])


@pytest.mark.parametrize("mode", MODES)
def test_a_copy_computes_with_its_own_parameters(mode: str) -> None:
    model = make()
    checkpoint_activations(model, mode)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(torch.nan)
    step(other)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in other.parameters())
    assert all(p.grad is None for p in model.parameters())


RANKS = """
import copy, gc
import torch
from eclip.model.residual import set_residual_dtype
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
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return everything(self.model, given, longest=7) + everything(self.model, given, longest=7)

def gradients(mode, shard):
    model = make().float() if autocast else make()
    set_residual_dtype(model, torch.bfloat16)
    checkpoint_activations(model, mode)
    root = spread(Root(model), ranks, ComputeConfig(shard=shard), block_dtype=torch.bfloat16 if autocast else None)
    torch.manual_seed(ranks.rank)
    given = inputs("cpu")
    for _ in range(2):
        for p in model.parameters():
            p.grad = None
        with torch.no_grad():
            root(given)
        root(given).backward()
    return [getattr(p.grad, "full_tensor", lambda: p.grad)() for p in model.parameters()]

ranks = start_ranks(find_ranks(timeout=60))
for autocast in (False, True):
    for shard in ("full", "none"):
        plain = gradients("none", shard)
        for mode in ("blocks", "selective"):
            found = gradients(mode, shard)
            assert all(map(torch.equal, found, plain)), (mode, shard, autocast)
            if ranks.is_main:
                print("same:", mode, shard, autocast, flush=True)
            gc.collect()
part(ranks)
"""


def test_under_sharding_and_averaging() -> None:
    """FSDP2 gathers a block's parameters again for its second pass; all in bfloat16 under autocast; and by DDP."""
    assert run_torchrun(RANKS, timeout=240).count("same:") == 8
