"""Slot attention against float64, against loops over the paper's equations, and on every path (see conftest.py)."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from eclip.kernels import launch
from eclip.kernels.slot_attention import (
    NORMALIZERS,
    share_tokens,
    slot_attention,
    slot_attention_absorbed,
    slot_attention_absorbed_reference,
    slot_attention_reference,
)
from eclip.kernels.slot_attention import ops as module
from tests.helpers import assert_as_accurate

EPS = 1e-6


def randn(*shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def kv_inputs(batch: int, queries: int, tokens: int, dim: int, seed: int = 0) -> list[Tensor]:
    """q, k, v."""
    return randn((batch, queries, dim), (batch, tokens, dim), (batch, tokens, dim), seed=seed)


def absorbed_inputs(batch: int, queries: int, tokens: int, dim: int, channels: int, seed: int = 0) -> list[Tensor]:
    """q, tokens, w_key, w_value, then gamma and beta of the LayerNorm."""
    weight, vector = (dim, channels), (channels,)
    shapes = (batch, queries, dim), (batch, tokens, channels), weight, weight, vector, vector
    q, x, w_key, w_value, gamma, beta = randn(*shapes, seed=seed)
    return [q, x, w_key / math.sqrt(channels), w_value / math.sqrt(channels), 1 + 0.2 * gamma, 0.2 * beta]


# --- Two formulations written independently of the module -------------------------------------------------------------


def equations(q: Tensor, k: Tensor, v: Tensor, heads: int, normalize: str, eps: float) -> tuple[Tensor, Tensor]:
    """Equations 1-4 of the paper, a number at a time. Returns out (B, T, D) and A (B, H, T, N)."""
    batch, num_queries, dim = q.shape
    num_tokens, width = k.shape[1], dim // heads
    root = math.sqrt(width)
    out = torch.zeros(batch, num_queries, dim, dtype=torch.float64)
    assignment = torch.zeros(batch, heads, num_queries, num_tokens, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            channels = range(h * width, (h + 1) * width)
            for n in range(num_tokens):
                m = [sum(float(k[b, n, c] * q[b, t, c]) for c in channels) / root for t in range(num_queries)]
                z = sum(math.exp(x) for x in m)
                for t in range(num_queries):
                    assignment[b, h, t, n] = math.exp(m[t]) / z
            for t in range(num_queries):
                row = assignment[b, h, t].tolist()
                weights = {
                    "mean": [(a + eps) / sum(x + eps for x in row) for a in row],
                    "den": [a / (sum(row) + eps) for a in row],
                    "l1max": [a / max(sum(row), eps) for a in row],
                    "sum": row,
                }[normalize]
                for c in channels:
                    out[b, t, c] = sum(w * float(v[b, n, c]) for n, w in enumerate(weights))
    return out, assignment


def eager(
    q: Tensor, k: Tensor, v: Tensor, *, num_heads: int = 1, normalize: str = "den", **_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """What one writes in PyTorch without care for precision: matmuls in the inputs' dtype, softmax in float32."""
    q, k, v = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q, k, v))
    assignment = (q @ k.mT / math.sqrt(q.shape[-1])).to(torch.promote_types(q.dtype, torch.float32)).softmax(-2)
    mass = assignment.sum(-1, keepdim=True)
    weights = {
        "mean": lambda: (assignment + EPS) / (mass + k.shape[2] * EPS),
        "den": lambda: assignment / (mass + EPS),
        "l1max": lambda: assignment / mass.clamp_min(EPS),
        "sum": lambda: assignment,
    }[normalize]()
    out = (weights.to(v.dtype) @ v).transpose(1, 2).flatten(2)
    entropy = -(assignment * assignment.clamp_min(1e-38).log()).sum((-1, -2))
    return out, assignment[:, 0] if num_heads == 1 else assignment, entropy


def eager_absorbed(
    q: Tensor, x: Tensor, w_key: Tensor, w_value: Tensor, *norm: Tensor, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    if norm:
        x = F.layer_norm(x, x.shape[-1:], *norm)
    return eager(q, x @ w_key.mT, x @ w_value.mT, **options)


def ours_absorbed(function: Callable[..., Any]) -> Callable[..., Any]:
    """The op with gamma and beta as last positional arguments, so that they are differentiated like the others."""

    def call(q: Tensor, x: Tensor, w_key: Tensor, w_value: Tensor, *norm: Tensor, **options: Any) -> Any:
        token_norm = (*norm, 1e-5) if norm else None
        return function(q, x, w_key, w_value, token_norm=token_norm, **options)

    return call


def outputs_and_gradients(function: Callable[..., Any], inputs: Sequence[Tensor], **options: Any) -> dict[str, Tensor]:
    """Output, map, entropy and the gradient of every input, for fixed random gradients of all three."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = function(*leaves, return_map=True, return_entropy=True, **options)
    seeds = [g.to(x) for g, x in zip(randn(*(tuple(x.shape) for x in outputs), seed=7), outputs, strict=True)]
    gradients = torch.autograd.grad(outputs, leaves, seeds)
    found = dict(zip(("out", "map", "entropy"), outputs, strict=True))
    return found | {f"gradient {i}": g for i, g in enumerate(gradients)}


def check(
    path: torch.device,
    function: Callable[..., Any],
    plain: Callable[..., Any],
    inputs: Sequence[Tensor],
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> None:
    """On `path` and in `dtype`, outputs and gradients miss float64 by at most twice what `plain` misses it by."""
    rounded = [x.to(dtype) for x in inputs]
    exact = outputs_and_gradients(plain, [x.double() for x in rounded], **options)
    low = outputs_and_gradients(plain, rounded, **options)
    ours = outputs_and_gradients(function, [x.to(path) for x in rounded], **options)
    for name, value in ours.items():
        assert value.isfinite().all(), name
        # An entropy is one number an image, in which the rounding of thousands of scores may cancel by luck.
        floor = max(1e-5, torch.finfo(dtype).eps / 8) if name == "entropy" else 1e-5
        assert_as_accurate(value, low[name], exact[name], floor=floor, name=name)


# --- The specification ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", NORMALIZERS)
@pytest.mark.parametrize("heads", [1, 2])
def test_equations(normalize: str, heads: int) -> None:
    q, k, v = kv_inputs(2, 3, 5, 4)
    out, assignment = equations(q, k, v, heads, normalize, 1e-2)
    for function in (slot_attention_reference, slot_attention):
        ours, ours_map, entropy = function(
            q, k, v, num_heads=heads, normalize=normalize, eps=1e-2, return_map=True, return_entropy=True
        )
        torch.testing.assert_close(ours, out)
        torch.testing.assert_close(ours_map, assignment[:, 0] if heads == 1 else assignment)
        torch.testing.assert_close(entropy, -(assignment * assignment.log()).sum((-1, -2)))


@pytest.mark.parametrize("heads", [1, 2])
def test_absorbed_equations(heads: int) -> None:
    q, x, w_key, w_value, gamma, beta = absorbed_inputs(2, 3, 5, 4, 6)
    unit = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    for norm, tokens in ((None, x), ((gamma, beta, 1e-5), unit * gamma + beta)):
        out, _ = equations(q, tokens @ w_key.T, tokens @ w_value.T, heads, "den", EPS)
        for function in (slot_attention_absorbed_reference, slot_attention_absorbed):
            ours = function(q, x, w_key, w_value, num_heads=heads, token_norm=norm)
            torch.testing.assert_close(ours, out)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("normalize", NORMALIZERS)
def test_gradients_are_those_of_the_reference(normalize: str, heads: int) -> None:
    """In float64, with bias, mask (one image without any query), LayerNorm and the map: every gradient, to rounding."""
    q, k, v = kv_inputs(3, 4, 6, 8)
    *absorbed, gamma, beta = absorbed_inputs(3, 4, 6, 8, 10)
    (bias,) = randn((3, 4))
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0]], dtype=torch.bool)
    options: dict[str, Any] = {"num_heads": heads, "normalize": normalize, "eps": 1e-2, "scale": 0.7}
    options["query_mask"] = mask

    def with_bias(function: Callable[..., Any], width: int) -> Callable[..., Any]:
        return lambda *x, **o: function(*x[:width], *x[width + 1 :], query_bias=x[width], **o)

    for ours, reference, inputs, width in (
        (slot_attention, slot_attention_reference, [q, k, v, bias], 3),
        (
            ours_absorbed(slot_attention_absorbed),
            ours_absorbed(slot_attention_absorbed_reference),
            [*absorbed, bias, gamma, beta],
            4,
        ),
    ):
        expected = outputs_and_gradients(with_bias(reference, width), inputs, **options)
        for name, value in outputs_and_gradients(with_bias(ours, width), inputs, **options).items():
            torch.testing.assert_close(value, expected[name], msg=lambda text, name=name: f"{name}: {text}")


def test_gradcheck() -> None:
    """Against finite differences: the reference's own gradients are not taken on trust."""
    q, k, v = (x.requires_grad_() for x in kv_inputs(1, 3, 4, 4))
    (bias,) = (x.requires_grad_() for x in randn((3,)))
    for normalize in NORMALIZERS:
        assert torch.autograd.gradcheck(
            lambda *x, m=normalize: slot_attention(
                *x[:3], query_bias=x[3], normalize=m, eps=0.1, return_map=True, return_entropy=True
            ),
            (q, k, v, bias),
        )


# --- Accuracy on every path -------------------------------------------------------------------------------------------

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


def test_wide_channels_take_several_programs(path: torch.device) -> None:
    check(path, slot_attention, eager, kv_inputs(1, 20, 20, 544))
    check(path, ours_absorbed(slot_attention_absorbed), eager_absorbed, absorbed_inputs(1, 20, 20, 32, 544))


@pytest.mark.parametrize("multiprocessors", [3, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_few_images_split_their_tokens(
    path: torch.device, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, multiprocessors: int
) -> None:
    """Over several programs, whose sums are added; in bf16 by the one-pass kernel, in fp32 by the general one."""
    monkeypatch.setattr(launch, "multiprocessors", lambda _: multiprocessors)
    inputs = absorbed_inputs(1, 7, 150, 96, 96)
    for normalize in ("mean", "den"):
        absorbed = ours_absorbed(slot_attention_absorbed)
        check(path, absorbed, eager_absorbed, inputs, dtype, normalize=normalize)


@pytest.mark.parametrize("generation", [8, 10])
def test_blocks_of_other_generations(
    interpreter: torch.device, monkeypatch: pytest.MonkeyPatch, generation: int
) -> None:
    """Block sizes depend on the GPU; everywhere else the interpreter takes those of Hopper."""
    monkeypatch.setattr(launch, "gpu_generation", lambda _: generation)
    for queries in (8, 20, 64):
        check(interpreter, slot_attention, eager, kv_inputs(1, queries, 150, 64), torch.bfloat16, normalize="mean")
        inputs = absorbed_inputs(1, queries, 150, 32, 96)
        check(interpreter, ours_absorbed(slot_attention_absorbed), eager_absorbed, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_folded_norm_survives_a_mean_offset(path: torch.device, dtype: torch.dtype) -> None:
    """Tokens whose mean lies at 5 standard deviations: the mean's contribution must cancel, not be rounded."""
    q, x, *rest = absorbed_inputs(2, 20, 49, 64, 64)
    check(path, ours_absorbed(slot_attention_absorbed), eager_absorbed, [q, x + 5, *rest], dtype)


# --- Corners ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", NORMALIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_dead_query(path: torch.device, normalize: str, dtype: torch.dtype) -> None:
    """A query that wins nothing: no 0 / 0 (1e-8 is 0 in fp16), and `mean` gives it the mean of the values."""
    q, k, v = (x.to(path, dtype).requires_grad_() for x in kv_inputs(2, 4, 9, 16))
    bias = torch.tensor([0.0, -1e4, 0.0, 0.0], device=path)
    out, assignment, entropy = slot_attention(
        q, k, v, query_bias=bias, normalize=normalize, eps=1e-8, return_map=True, return_entropy=True
    )
    assert not assignment[:, 1].any()
    assert isinstance(entropy, Tensor) and entropy.isfinite().all()
    expected = v.mean(1) if normalize == "mean" else torch.zeros_like(out[:, 1])
    torch.testing.assert_close(out[:, 1], expected, atol=2e-3 if dtype == torch.float16 else 1e-6, rtol=0)
    gradients = torch.autograd.grad(out.float().square().sum() + entropy.sum(), (q, k, v))
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("normalize", NORMALIZERS)
def test_absent_queries_change_nothing(path: torch.device, normalize: str) -> None:
    q, k, v = (x.to(path, torch.float32) for x in kv_inputs(2, 5, 9, 16))
    mask = torch.tensor([[True, False, True, True, False], [False] * 5], device=path)
    asked: dict[str, Any] = {"normalize": normalize, "return_map": True, "return_entropy": True}
    out, assignment, entropy = slot_attention(q, k, v, query_mask=mask, **asked)
    alone, alone_map, alone_entropy = slot_attention(q[:1, mask[0]], k[:1], v[:1], **asked)
    torch.testing.assert_close(out[:1, mask[0]], alone)
    torch.testing.assert_close(assignment[:1, mask[0]], alone_map)
    torch.testing.assert_close(entropy, torch.cat([alone_entropy, torch.zeros_like(alone_entropy)]))
    assert not out[~mask].any() and not assignment[~mask].any()


@pytest.mark.parametrize("shape", ["shared", "per image"])
def test_query_bias(path: torch.device, shape: str) -> None:
    q, k, v = (x.float() for x in kv_inputs(2, 5, 9, 16))
    (bias,) = randn((5,) if shape == "shared" else (2, 5))
    expected = slot_attention_reference(q, k, v, query_bias=bias.float(), num_heads=2)
    ours = slot_attention(q.to(path), k.to(path), v.to(path), query_bias=bias.float().to(path), num_heads=2)
    torch.testing.assert_close(ours.cpu(), expected, atol=1e-5, rtol=1e-5)


def test_strided_tokens_are_read_in_place(path: torch.device) -> None:
    """Patch tokens are `x[:, 1:]` of the encoder's output; rows may be a slice of wider ones."""
    q, x, w_key, w_value, *_ = (x.to(path, torch.float32) for x in absorbed_inputs(3, 4, 10, 16, 32))
    view = x[:, 1:, 8:24]
    weights = w_key[:, :16].contiguous(), w_value[:, :16].contiguous()
    torch.testing.assert_close(
        slot_attention_absorbed(q, view, *weights), slot_attention_absorbed(q, view.contiguous(), *weights)
    )
    torch.testing.assert_close(slot_attention(q, view, view), slot_attention(q, view.contiguous(), view.contiguous()))


def test_empty_batch(path: torch.device) -> None:
    q, k, v = (x.to(path, torch.float32).requires_grad_() for x in kv_inputs(0, 4, 9, 16))
    out, assignment = slot_attention(q, k, v, return_map=True)
    assert out.shape == (0, 4, 16) and assignment.shape == (0, 4, 9)
    assert [g.shape for g in torch.autograd.grad(out.sum(), (q, k, v))] == [q.shape, k.shape, v.shape]
    weights = torch.ones(16, 16, device=path, requires_grad=True)
    gradient = torch.autograd.grad(slot_attention_absorbed(q, k, weights, weights).sum(), weights)[0]
    assert gradient.shape == (16, 16) and not gradient.any()


def test_every_output_element_is_written(path: torch.device) -> None:
    """Uninitialised memory is filled with NaN; padding to block sizes must leave none behind."""
    inputs = [x.to(path, torch.float32) for x in kv_inputs(2, 7, 37, 40)]
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory and inputs[0].new_empty(3).isnan().all()
        values = outputs_and_gradients(slot_attention, inputs)
    finally:
        torch.use_deterministic_algorithms(was)
    for name, value in values.items():
        assert value.isfinite().all(), name


def test_inputs_are_not_written(path: torch.device) -> None:
    inputs = [x.to(path, torch.float32) for x in absorbed_inputs(2, 5, 9, 16, 24)]
    before = [x.clone() for x in inputs]
    outputs_and_gradients(ours_absorbed(slot_attention_absorbed), inputs)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


def test_gradients_only_where_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frozen tokens cost no token gradient."""
    asked = []
    plain = module.plain_backward
    monkeypatch.setattr(module, "plain_backward", lambda *a: (asked.append(a[-1]), plain(*a))[1])
    q, x, w_key, w_value, *_ = absorbed_inputs(2, 3, 5, 8, 8)
    w_key.requires_grad_()
    torch.autograd.grad(slot_attention_absorbed(q, x, w_key, w_value).sum(), w_key)
    assert asked == [False]


# --- Composition ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["keys and values", "absorbed"])
@pytest.mark.parametrize("extras", [False, True])
def test_opcheck(form: str, extras: bool) -> None:
    q, k, v = (x.float().view(2, -1, 3, 8).transpose(1, 2).requires_grad_() for x in kv_inputs(2, 4, 6, 24))
    bias = torch.randn(2, 3, 4, requires_grad=True)
    mask = torch.tensor([[True] * 4, [True, False] * 2])
    options = (0.5, "mean", EPS)
    if form == "absorbed":
        args = (q, k[:, :1], None, None, None, *options, 1e-5, extras, extras)
    else:
        args = (q, k, v, bias, mask, *options, None, extras, extras)
    torch.library.opcheck(module.core, args)
    out, mass, *_ = (x.detach() for x in module.core(*args))
    tensors = [x.detach() if isinstance(x, Tensor) else x for x in args[:5]]
    grad_out = torch.randn_like(out)
    grads = [torch.randn(shape) if extras else None for shape in ((2, 3, 4, 6), (2, 3))]
    backward = (grad_out, None, *grads, *tensors, mass, out, *args[5:9])
    for token_grad in (False, True):
        torch.library.opcheck(module.core_backward, (*backward, token_grad))
    *_, coefficients, affine = module.core_backward(*backward, True)
    affines = [affine, affine] if form == "absorbed" else []
    factors = ([coefficients] * 2, [tensors[0]] * 2, [grad_out] * 2, affines, tensors[1])
    torch.library.opcheck(module.token_gradients, (*factors, "both" if form == "absorbed" else "queries"))


def test_compiles_without_graph_breaks(path: torch.device) -> None:
    inputs = [x.to(path, torch.float32) for x in absorbed_inputs(2, 4, 7, 16, 16)]

    def block(q: Tensor, x: Tensor, w_key: Tensor, w_value: Tensor, *norm: Tensor, **asked: bool) -> Any:
        tokens = x[:, 1:]
        out, *extras = slot_attention_absorbed(q, tokens, w_key, w_value, token_norm=(norm[0], norm[1], 1e-5), **asked)
        return slot_attention(out, tokens, tokens, num_heads=2), *extras

    expected = outputs_and_gradients(block, inputs)
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for name, value in outputs_and_gradients(compiled, inputs).items():
        torch.testing.assert_close(value, expected[name])


# --- Tokens that several calls share ----------------------------------------------------------------------------------


def chain(
    q: Tensor, x: Tensor, w_key: Tensor, w_value: Tensor, *norm: Tensor, shared: bool, recompute: bool = False, **o: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Three calls on the same tokens, the second without LayerNorm; the last map, the sum of entropies."""
    tokens, ports = x, [None] * 3
    if shared:
        tokens, ports = share_tokens(x, 4, num_queries=q.shape[1], num_heads=o.get("num_heads", 1))  # the last unused
    total: Any = 0

    def attend(q: Tensor, token_norm: Any, port: Any) -> Any:
        return slot_attention_absorbed(q, tokens, w_key, w_value, token_norm=token_norm, port=port, **o)

    for i, port in zip(range(3), ports, strict=False):
        token_norm = (*norm, 1e-5) if norm and i != 1 else None
        run = functools.partial(checkpoint, attend, use_reentrant=False) if recompute else attend
        out, assignment, entropy = run(q, token_norm, port)
        q, total = q + out, total + entropy
    return q, assignment, total


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("how", ["eager", "recompute", "compile"])
def test_shared_tokens_get_the_sum_of_all_gradients(how: str, norm: bool, heads: int) -> None:
    """The factors, multiplied out at the end, against autograd's own addition; in float64, to rounding."""
    inputs = absorbed_inputs(2, 4, 7, 16, 12)[: 6 if norm else 4]
    expected = outputs_and_gradients(functools.partial(chain, shared=False), inputs, num_heads=heads)
    run = functools.partial(chain, shared=True, recompute=how == "recompute")
    if how == "compile":
        torch._dynamo.reset()
        run = torch.compile(run, fullgraph=True, backend="aot_eager")
    for name, value in outputs_and_gradients(run, inputs, num_heads=heads).items():
        torch.testing.assert_close(value, expected[name], msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_shared_tokens_on_every_path(path: torch.device, dtype: torch.dtype) -> None:
    inputs = absorbed_inputs(2, 20, 37, 48, 64)

    def plain(q: Tensor, x: Tensor, w_key: Tensor, w_value: Tensor, *norm: Tensor, **o: Any) -> Any:
        total: Any = 0
        for i in range(3):
            out, assignment, entropy = eager_absorbed(q, x, w_key, w_value, *(() if i == 1 else norm), **o)
            q, total = q + out, total + entropy
        return q, assignment, total

    check(path, functools.partial(chain, shared=True), plain, inputs, dtype)


def test_shared_tokens_that_want_no_gradient(path: torch.device) -> None:
    q, x, *weights = (x.to(path, torch.float32) for x in absorbed_inputs(2, 4, 7, 16, 12)[:4])
    q.requires_grad_()
    tokens, (port,) = share_tokens(x, 1, num_queries=4)
    with_port = torch.autograd.grad(slot_attention_absorbed(q, tokens, *weights, port=port).sum(), q)
    torch.testing.assert_close(with_port, torch.autograd.grad(slot_attention_absorbed(q, x, *weights).sum(), q))


def test_sharing_casts_once_under_autocast() -> None:
    q, x, *weights = (x.float() for x in absorbed_inputs(2, 4, 7, 16, 12)[:4])
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        tokens, (port,) = share_tokens(x, 1, num_queries=4)
        out = slot_attention_absorbed(q, tokens, *weights, port=port)
    assert tokens.dtype == out.dtype == torch.bfloat16
    (gradient,) = torch.autograd.grad(out.float().sum(), x)
    assert gradient.dtype == torch.float32


def test_mistakes_with_ports_are_named() -> None:
    q, x, *weights = (x.float() for x in absorbed_inputs(2, 4, 7, 16, 12)[:4])
    tokens, (port,) = share_tokens(x, 1, num_queries=4)
    with pytest.raises(ValueError, match=r"port is for torch.float32 queries of shape \(2, 1, 4, 12\)"):
        slot_attention_absorbed(q, tokens, *weights, num_heads=2, port=port)
    with pytest.raises(ValueError, match="pass those that share_tokens returned"):
        slot_attention_absorbed(q, x.requires_grad_(), *weights, port=port)
    tokens, (port,) = share_tokens(x.detach().requires_grad_(), 1, num_queries=4)
    slot_attention_absorbed(q, tokens, *weights, port=port)
    with pytest.raises(ValueError, match="this port served another call already"):
        slot_attention_absorbed(q, tokens, *weights, port=port)
    with pytest.raises(ValueError, match="uses=0"):
        share_tokens(x, 0, num_queries=4)
    with pytest.raises(ValueError, match=r"tokens have shape \(7, 12\)"):
        share_tokens(x[0], 1, num_queries=4)


# --- Autocast and mistakes --------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 4)}, r"q has shape \(2, 4\)"),
        ({"q": torch.zeros(2, 0, 8)}, "no query"),
        ({"k": torch.zeros(2, 0, 8), "v": torch.zeros(2, 0, 8)}, "no token"),
        ({"k": torch.zeros(3, 6, 8)}, r"k has shape \(3, 6, 8\); q and k ask for \(2, 6, 8\)"),
        ({"v": torch.zeros(2, 5, 8)}, "v has shape"),
        ({"v": torch.zeros(2, 6, 8, dtype=torch.float64)}, "v has dtype torch.float64 and q torch.float32"),
        ({"q": torch.zeros(2, 4, 8, dtype=torch.long)}, "a floating dtype is needed"),
        ({"num_heads": 3}, "num_heads=3 does not divide the D=8"),
        ({"normalize": "softmax"}, "use one of mean, den, l1max, sum"),
        ({"eps": 0.0}, "eps=0.0 must be positive"),
        ({"query_bias": torch.zeros(5)}, "query_bias has shape"),
        ({"query_mask": torch.ones(2, 4)}, "query_mask is torch.float32"),
    ],
)
def test_mistakes_are_named(change: dict[str, Any], message: str) -> None:
    arguments = {"q": torch.zeros(2, 4, 8), "k": torch.zeros(2, 6, 8), "v": torch.zeros(2, 6, 8)} | change
    for function in (slot_attention, slot_attention_reference):
        with pytest.raises(ValueError, match=message):
            function(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": torch.zeros(3, 6, 10)}, r"tokens have shape \(3, 6, 10\)"),
        ({"w_key": torch.zeros(10, 8)}, r"w_key has shape \(10, 8\); q and tokens ask for \(8, 10\)"),
        ({"token_norm": (torch.ones(8), torch.zeros(10), 1e-5)}, "token_norm's gamma"),
    ],
)
def test_absorbed_mistakes_are_named(change: dict[str, Any], message: str) -> None:
    arguments = {"q": torch.zeros(2, 4, 8), "tokens": torch.zeros(2, 6, 10)}
    arguments |= {"w_key": torch.zeros(8, 10), "w_value": torch.zeros(8, 10)} | change
    for function in (slot_attention_absorbed, slot_attention_absorbed_reference):
        with pytest.raises(ValueError, match=message):
            function(**arguments)


# --- Sizes of the paper, on a GPU -------------------------------------------------------------------------------------


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


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_results_repeat_to_the_bit(dtype: torch.dtype) -> None:
    """No atomics: the same inputs give the same bits, whatever else runs on the GPU."""
    inputs = [x.to("cuda", dtype) for x in absorbed_inputs(64, 20, 196, 768, 768)]
    first, second = (outputs_and_gradients(ours_absorbed(slot_attention_absorbed), inputs) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.gpu
def test_more_images_than_a_grid_has_rows() -> None:
    """65,535 is the limit of a grid's second and third axis."""
    q, x = (torch.randn(70_000, n, 16, device="cuda", dtype=torch.bfloat16).requires_grad_() for n in (3, 5))
    weight = torch.eye(16, device="cuda", dtype=torch.bfloat16)
    out = slot_attention_absorbed(q, x, weight, weight)
    assert isinstance(out, Tensor)
    gradients = torch.autograd.grad(out.float().square().sum(), (q, x))
    exact = slot_attention_absorbed_reference(q[-2:].double(), x[-2:].double(), weight.double(), weight.double())
    assert isinstance(exact, Tensor)
    torch.testing.assert_close(out[-2:].double(), exact, atol=2e-2, rtol=2e-2)
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.gpu
def test_limits_of_the_gpu_kernel_are_named() -> None:
    q, k, v = (x.to("cuda", torch.float32) for x in kv_inputs(1, 65, 4, 16))
    with pytest.raises(ValueError, match="T=65"):
        slot_attention(q, k, v)
    with pytest.raises(ValueError, match="float64"):
        slot_attention(q.double(), k.double(), v.double())
