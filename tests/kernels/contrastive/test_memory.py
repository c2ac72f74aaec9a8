"""What the Triton path of the contrastive losses allocates and where its kernels read and write, without a GPU.

Allocations are counted on tensors without memory, at the sizes that matter, through autograd, with the launches left
out. Bounds and races are watched in the interpreter, at small sizes.
"""

import contextlib
import functools
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from eclip.kernels import launch
from eclip.kernels.contrastive import contrastive_loss, ops, ranks, triton_backward, triton_forward, triton_positives
from eclip.kernels.contrastive.ops import pair_statistics
from eclip.kernels.contrastive.options import padded_shape
from eclip.kernels.contrastive.problem import Logits, magnitudes, safe_shift
from tests.kernels.contrastive.checks import make_arguments, opposed, value_and_grads, with_features
from tests.kernels.watch_interp import Builder, watch

KERNELS = {
    triton_forward: ("_contrastive_fwd_kernel", "_contrastive_sums_kernel"),
    triton_backward: ("_contrastive_bwd_kernel", "_contrastive_rescale_kernel"),
    triton_positives: ("_contrastive_target_kernel", "_contrastive_finish_kernel"),
}


class NoLaunch:
    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **options: None


OPS = {
    torch.ops.eclip.pair_total.default: ops.pair_total,
    torch.ops.eclip.pair_gradients.default: ops.pair_gradients,
}


class Allocated(TorchDispatchMode):
    """Bytes of storages made inside it, by autograd as well: now, and at the most.

    The two ops run what they would on a GPU, where tensors without memory would only ask for the results' shapes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in OPS:
            with self:
                return OPS[func]._init_fn(*args, **(kwargs or {}))
        given = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and id(x.untyped_storage()) not in given | self.known:
                self._add(x.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        name, size = id(storage), storage.nbytes()
        self.known.add(name)
        self.held += size
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self._drop, name, size)

    def _drop(self, name: int, size: int) -> None:
        self.known.discard(name)
        self.held -= size


@pytest.mark.parametrize(
    ("batch", "dim", "positives", "keep", "frozen", "most"),
    [
        (2**15, 512, "diagonal", False, "", 1.4e9),
        (2**15, 512, "diagonal", True, "", 3.5e9),
        (2**17, 512, "diagonal", False, "", 1.7e9),
        (2**17, 1024, "all", False, "", 2.4e9),
        (2**17, 1024, "all", False, "image", 1.9e9),
        (2**17, 1024, "all", False, "text", 1.9e9),
        (2**20, 512, "diagonal", False, "", 6.6e9),
        (2**20, 1024, "all", False, "", 13.5e9),
    ],
)
def test_peak_memory(
    monkeypatch: pytest.MonkeyPatch, batch: int, dim: int, positives: str, keep: bool, frozen: str, most: float
) -> None:
    """Above the inputs, forward and backward. The goals are 3 GB at 131072 pairs and 20 GB at a million, D = 512."""
    monkeypatch.setattr(launch, "launches_triton", lambda x: True)
    monkeypatch.setattr(ops, "autocast_off", lambda x: contextlib.nullcontext())
    for module, names in KERNELS.items():
        for name in names:
            monkeypatch.setattr(module, name, NoLaunch())
    monkeypatch.setattr(triton_backward, "_accumulate", lambda *args: None)

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    image, text, scale = empty(batch, dim), empty(batch, dim), empty(1, dtype=torch.float32)
    leaves = [x.requires_grad_(name != frozen) for name, x in (("image", image), ("text", text), ("scale", scale))]
    ids = None if positives == "diagonal" else empty(batch, dtype=torch.int64)
    with Allocated() as allocated:
        keep_bytes = 2 * batch * batch if keep else 0
        ops.pair_loss(*leaves, None, ids, ids, "both", positives, keep_bytes).backward()
    assert [x.grad is not None for x in leaves] == [x.requires_grad for x in leaves]
    assert 0.8 * most < allocated.peak < most, f"{allocated.peak / 1e9:.2f} GB"


# --- Interpreted ------------------------------------------------------------------------------------------------------


@pytest.fixture
def watched(interpreter: torch.device) -> Iterator[torch.device]:
    """Interpreted kernels that may neither leave their tensors nor race."""
    with watch():
        yield interpreter


@pytest.mark.parametrize("dtype, batch", [(torch.bfloat16, 1), (torch.float32, 33), (torch.bfloat16, 129)])
def test_kernels_stay_within_their_tensors(watched: torch.device, dtype: torch.dtype, batch: int) -> None:
    """No read or write beyond the end (a GPU would forgive it silently), no address that two programs write."""
    for positives in ("mask", "diagonal") if batch > 100 else ("mask", "diagonal", "soft"):
        make = opposed if positives == "diagonal" else make_arguments  # of which the former takes the second passes
        arguments = make(batch, 64, positives=positives, bias=positives != "diagonal")
        for keep_bytes in (0, 2**20) if dtype == torch.bfloat16 else (0,):
            loss = functools.partial(contrastive_loss, keep_bytes=keep_bytes)
            value_and_grads(loss, with_features(arguments, dtype))


@pytest.mark.parametrize("sides", ["both", "rows"])
def test_blocks_of_columns_keep_what_the_whole_keeps(watched: torch.device, sides: str) -> None:
    """A rank's own columns and those before and after write slices of one matrix."""
    arguments = with_features(make_arguments(20, 64, keys=700), torch.bfloat16)
    image, text, scale = (arguments[name] for name in ("image_features", "text_features", "logit_scale"))
    own, shift = slice(256, 512), safe_shift(magnitudes(image, text, None), scale, sides)
    weights = (torch.ones(20), torch.ones(700))
    logits = Logits(image, text, scale, None, None, None, *weights, shift, own.start, sides, "diagonal")
    whole, parts = (torch.zeros(padded_shape(20, 700), dtype=torch.bfloat16) for _ in range(2))
    pair_statistics(logits, whole)

    class Arrived(ranks.Arriving):
        def __init__(self) -> None:
            pass

        def wait(self) -> Tensor:
            return text

    ranks._statistics(logits, text[own], Arrived(), own, parts)
    assert whole[:20, :700].min() > 0
    assert torch.equal(whole[:20, :700], parts[:20, :700])


def test_blocks_are_dropped_before_the_next_is_made(
    interpreter: torch.device,
    tiny: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A block is the largest tensor of the backward: two at a time would be another GiB."""
    make = triton_backward._gradient_block
    made: list[weakref.ref[Tensor]] = []

    def gradient_block(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        assert all(block() is None for block in made)
        block, sums = make(*arguments, **options)
        made.append(weakref.ref(block))
        return block, sums

    monkeypatch.setattr(triton_backward, "_gradient_block", gradient_block)
    value_and_grads(contrastive_loss, make_arguments(200, 16))
    assert len(made) == 4


@pytest.mark.parametrize(("keep_bytes", "expected"), [(0, 2), (2**20, 1)])
def test_products_are_computed_once_a_pass(
    interpreter: torch.device, monkeypatch: pytest.MonkeyPatch, keep_bytes: int, expected: int
) -> None:
    """Where the shift is safe the second passes return at once, and kept logits are not computed again."""
    create_dot, calls = Builder.create_dot, []

    def counted(*operands: Any) -> Any:
        calls.append(operands)
        return create_dot(*operands)

    monkeypatch.setattr(Builder, "create_dot", counted)
    arguments = with_features(make_arguments(20, 64), torch.bfloat16)
    value_and_grads(functools.partial(contrastive_loss, keep_bytes=keep_bytes), arguments)
    assert len(calls) == 2 * expected  # of the two halves of one tile
