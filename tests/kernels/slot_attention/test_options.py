"""What the Triton kernels of slot attention take, and the blocks they are launched with."""

from typing import Any

import pytest
import torch
from torch import Tensor

from eclip.kernels import launch
from eclip.kernels.compile_check import SHARED_MEMORY
from eclip.kernels.slot_attention import MAX_KERNEL_DIM, MAX_KERNEL_QUERIES, ops, slot_attention, supported
from eclip.kernels.slot_attention.options import general_options, one_pass_options, scores_options, tokens_options
from tests.helpers import assert_as_accurate
from tests.kernels.slot_attention.checks import eager, kv_inputs

BF16, FP32 = torch.bfloat16, torch.float32


def test_what_the_kernels_take() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert supported(dtype, MAX_KERNEL_QUERIES, MAX_KERNEL_DIM) is None
        assert supported(dtype, 1, 1) is None


@pytest.mark.parametrize(
    ("dtype", "queries", "dim", "reason"),
    [
        (torch.float64, 4, 16, "no GPU kernel for torch.float64; use slot_attention_reference or cast to float32"),
        (FP32, 65, 16, "T=65, channels=16: the GPU kernel holds at most T=64 queries of 2048 channels a head"),
        (BF16, 20, 2049, "T=20, channels=2049: the GPU kernel holds at most T=64 queries of 2048 channels a head"),
    ],
    ids=["dtype", "queries", "channels"],
)
def test_why_the_kernels_do_not_take_it(dtype: torch.dtype, queries: int, dim: int, reason: str) -> None:
    found = supported(dtype, queries, dim)
    assert found is not None and found.startswith(reason)
    assert "use slot_attention_reference" in found


@pytest.mark.parametrize(
    ("queries", "dtype", "launched"), [(64, FP32, True), (65, FP32, False), (4, torch.float64, False)]
)
def test_what_is_not_supported_is_computed_in_pytorch(
    interpreter: torch.device, monkeypatch: pytest.MonkeyPatch, queries: int, dtype: torch.dtype, launched: bool
) -> None:
    """The ops ask the predicate that the errors ask. (On a GPU the public functions raise before.)"""
    calls = []
    kernel = ops.triton_forward
    monkeypatch.setattr(ops, "triton_forward", lambda *a: (calls.append(1), kernel(*a))[1])
    inputs = kv_inputs(1, queries, 5, 16)
    q, k, v = (x.to(dtype) for x in inputs)
    out = slot_attention(q, k, v)
    assert isinstance(out, Tensor)
    assert_as_accurate(out, eager(q, k, v)[0], eager(*inputs)[0])
    assert bool(calls) == launched


def test_wide_tokens_take_the_one_pass_kernel_where_it_fits() -> None:
    def fits(queries: int, channels: int, arch: int) -> bool:
        limit = SHARED_MEMORY[arch]
        options = {"normalize": "den", "norm": False, "return_map": False, "limit": limit}
        return one_pass_options(queries, channels, torch.bfloat16, **options) is not None  # type: ignore[arg-type]

    assert fits(20, 1152, 80) and fits(20, 1152, 90) and not fits(20, 1408, 90) and not fits(20, 1152, 120)
    assert fits(15, 1408, 80) and fits(15, 1408, 90) and not fits(15, 1664, 90)


def test_one_pass_pads_channels_as_little_as_it_can() -> None:
    """Chunks of 128 or 256 channels, at most four up to D = 1024."""
    for dim, chunks, width in (
        (65, 1, 128),
        (256, 1, 256),
        (384, 3, 128),
        (512, 2, 256),
        (768, 3, 256),
        (1152, 9, 128),
    ):
        options = one_pass_options(20, dim, BF16, normalize="den", norm=False, return_map=False, limit=232448)
        assert options is not None and (options["CHUNKS"], options["BLOCK_C"]) == (chunks, width), dim


@pytest.mark.parametrize(
    ("change", "generation", "block_n"),
    [
        ({}, 9, 256),
        ({}, 8, 256),
        ({"grad_map": True}, 9, 128),
        ({"extras": True}, 10, 64),
        ({"norm": True}, 9, 256),
        ({"norm": True, "num_tokens": 576}, 9, 128),
        ({"num_tokens": 576}, 8, 128),
        ({"separate": True, "dim": 64}, 8, 128),
        ({"num_queries": 64, "norm": True, "grad_map": True}, 9, 32),
        ({"dtype": FP32}, 9, 32),
        ({"dim": 100}, 9, 64),
    ],
    ids=lambda x: " ".join(x) or "plain" if isinstance(x, dict) else None,
)
def test_tokens_of_a_block_of_the_backward(change: dict[str, Any], generation: int, block_n: int) -> None:
    """The decoder's 196 tokens lie in one block, unless something else needs the registers."""
    call: dict[str, Any] = {"num_queries": 20, "num_tokens": 196, "dim": 768, "dtype": BF16}
    call |= dict.fromkeys(("separate", "norm", "extras", "grad_map"), False)
    assert scores_options(**call | change, generation=generation)["BLOCK_N"] == block_n


def test_blocks_are_powers_of_two_that_the_products_take() -> None:
    """Every side of a tile is 16 or more, whatever the shape."""
    for queries in (1, 15, 16, 17, 32, 33, 64):
        for dim in (1, 16, 31, 64, 100, 768, 1408, 2048):
            for dtype in (BF16, FP32):
                for norm in (False, True):
                    found = [
                        general_options(queries, dim, dtype, norm=norm, normalize="mean", generation=9),
                        tokens_options(max(16, queries), 196, dim, dtype, one_entry=True, norm=norm)
                        if queries in (16, 32, 64)
                        else {},
                    ]
                    for generation in (8, 9, 10):
                        flags = {"separate": False, "norm": norm, "extras": norm, "grad_map": norm}
                        found.append(scores_options(queries, 196, dim, dtype, **flags, generation=generation))
                    sides = [x for options in found for name, x in options.items() if name.startswith("BLOCK_")]
                    assert all(x >= 16 and x & (x - 1) == 0 for x in sides), (queries, dim, dtype, norm)


def test_shared_memory_of_no_gpu_is_an_h100s() -> None:
    assert launch.shared_memory(torch.ones(1)) == SHARED_MEMORY[90]
