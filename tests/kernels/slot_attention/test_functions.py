"""Slot attention against float64 on every path (see conftest.py): shapes, dtypes, autocast, the sizes of the paper."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from eclip.kernels.slot_attention import (
    NORMALIZERS,
    slot_attention,
    slot_attention_absorbed,
    slot_attention_absorbed_reference,
    slot_attention_reference,
)
from tests.helpers import assert_as_accurate
from tests.kernels.slot_attention.checks import (
    absorbed_inputs,
    check,
    eager,
    eager_absorbed,
    kv_inputs,
    ours_absorbed,
    outputs_and_gradients,
)

# B, T, N, D, heads
SHAPES = [
    (1, 1, 1, 16, 1),
    (2, 7, 49, 24, 1),
    (2, 16, 5, 48, 3),
    (1, 20, 33, 40, 1),
    (3, 32, 17, 16, 2),
    (1, 64, 40, 8, 1),
]


@pytest.mark.parametrize(("batch", "queries", "tokens", "dim", "heads"), SHAPES)
def test_odd_shapes(path: torch.device, batch: int, queries: int, tokens: int, dim: int, heads: int) -> None:
    check(path, slot_attention, eager, kv_inputs(batch, queries, tokens, dim), num_heads=heads)
    inputs = absorbed_inputs(batch, queries, tokens, dim, dim + 8)
    check(path, ours_absorbed(slot_attention_absorbed), eager_absorbed, inputs, num_heads=heads)


# The interpreter takes a second for the larger of these, so it gets SHAPES above alone.
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("heads", [1, 3, 12])
@pytest.mark.parametrize("tokens", [1, 49, 196, 197])
@pytest.mark.parametrize("queries", [1, 7, 16, 20, 32, 64])
def test_every_shape(device: str, queries: int, tokens: int, heads: int) -> None:
    check(torch.device(device), slot_attention, eager, kv_inputs(2, queries, tokens, 48), num_heads=heads)
    inputs = absorbed_inputs(2, queries, tokens, 24, 48)
    check(torch.device(device), ours_absorbed(slot_attention_absorbed), eager_absorbed, inputs, num_heads=heads)


@given(
    batch=st.integers(0, 3),
    queries=st.integers(1, 70),
    tokens=st.integers(1, 40),
    heads=st.sampled_from([1, 2, 3]),
    width=st.integers(1, 9),
    channels=st.integers(1, 20),
    normalize=st.sampled_from(NORMALIZERS),
    norm=st.booleans(),
)
@settings(max_examples=40, derandomize=True, deadline=None)
def test_any_shape(
    batch: int, queries: int, tokens: int, heads: int, width: int, channels: int, normalize: str, norm: bool
) -> None:
    """Of the PyTorch implementation, to rounding: both forms, every output, every gradient."""
    inputs = kv_inputs(batch, queries, tokens, heads * width)
    absorbed = absorbed_inputs(batch, queries, tokens, heads * width, channels)[: 6 if norm else 4]
    for ours, reference, given_inputs in (
        (slot_attention, slot_attention_reference, inputs),
        (ours_absorbed(slot_attention_absorbed), ours_absorbed(slot_attention_absorbed_reference), absorbed),
    ):
        options = {"num_heads": heads, "normalize": normalize, "eps": 1e-3}
        expected = outputs_and_gradients(reference, given_inputs, **options)
        for name, value in outputs_and_gradients(ours, given_inputs, **options).items():
            torch.testing.assert_close(value, expected[name], atol=1e-9, rtol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


@given(
    batch=st.integers(1, 2),
    queries=st.integers(1, 64),
    tokens=st.integers(1, 70),
    heads=st.sampled_from([1, 2]),
    width=st.integers(1, 4),
    normalize=st.sampled_from(NORMALIZERS),
    norm=st.booleans(),
)
@settings(max_examples=8, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_shape_interpreted(
    interpreter: torch.device, batch: int, queries: int, tokens: int, heads: int, width: int, normalize: str, norm: bool
) -> None:
    dim = 8 * heads * width
    check(
        interpreter, slot_attention, eager, kv_inputs(batch, queries, tokens, dim), num_heads=heads, normalize=normalize
    )
    inputs = absorbed_inputs(batch, queries, tokens, dim, 8 * width)[: 6 if norm else 4]
    absorbed = ours_absorbed(slot_attention_absorbed)
    check(interpreter, absorbed, eager_absorbed, inputs, num_heads=heads, normalize=normalize)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("normalize", NORMALIZERS)
def test_dtypes(path: torch.device, normalize: str, dtype: torch.dtype) -> None:
    check(path, slot_attention, eager, kv_inputs(4, 5, 49, 32), dtype, num_heads=2, normalize=normalize)
    absorbed = ours_absorbed(slot_attention_absorbed)
    inputs = absorbed_inputs(4, 5, 49, 32, 48)  # fewer rows, and the two maximal errors are compared by luck
    check(path, absorbed, eager_absorbed, inputs[:4], dtype, normalize=normalize)
    check(path, absorbed, eager_absorbed, inputs, dtype, normalize=normalize)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_folded_norm_survives_a_mean_offset(path: torch.device, dtype: torch.dtype) -> None:
    """Tokens whose mean lies at 5 standard deviations: the mean's contribution must cancel, not be rounded."""
    q, x, *rest = absorbed_inputs(2, 20, 49, 64, 64)
    check(path, ours_absorbed(slot_attention_absorbed), eager_absorbed, [q, x + 5, *rest], dtype)


def test_autocast(path: torch.device) -> None:
    """Inputs are cast as a Linear's would be; the output has autocast's dtype and accuracy, the map is float32."""
    inputs = [x.to(path, torch.float32) for x in absorbed_inputs(2, 5, 37, 32, 48)[:4]]
    exact = slot_attention_absorbed_reference(*(x.cpu().double() for x in inputs))
    with torch.autocast(path.type, torch.bfloat16):
        out, assignment = slot_attention_absorbed(*inputs, return_map=True)
        low, *_ = eager_absorbed(*inputs)
        mixed = slot_attention_absorbed_reference(
            inputs[0].bfloat16(), *inputs[1:]
        )  # queries of a Linear, fp32 weights
    assert isinstance(mixed, Tensor) and mixed.dtype == torch.bfloat16
    assert_as_accurate(mixed, low, exact)
    assert out.dtype == torch.bfloat16 and assignment.dtype == torch.float32
    assert isinstance(exact, Tensor)
    assert_as_accurate(out, low, exact)


@pytest.mark.parametrize("form", ["absorbed", "absorbed, 4 heads", "absorbed, norm", "keys and values, 12 heads"])
def test_paper_size_in_bf16(path: torch.device, form: str) -> None:
    if form.startswith("keys"):
        check(path, slot_attention, eager, kv_inputs(1, 20, 196, 768), torch.bfloat16, num_heads=12)
        return
    inputs = absorbed_inputs(1, 20, 197, 768, 768)[: 6 if "norm" in form else 4]
    absorbed = ours_absorbed(slot_attention_absorbed)
    check(path, absorbed, eager_absorbed, inputs, torch.bfloat16, num_heads=4 if "4 heads" in form else 1)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [1, 12])
def test_paper_size_in_fp32(heads: int) -> None:
    device = torch.device("cuda")
    check(device, slot_attention, eager, kv_inputs(4, 20, 196, 768), num_heads=heads)
    inputs = absorbed_inputs(4, 20, 197, 768, 768)
    check(device, ours_absorbed(slot_attention_absorbed), eager_absorbed, inputs, num_heads=heads)
