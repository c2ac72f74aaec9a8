"""Slot attention: one block with its projections, the core alone, six blocks on the same tokens, the whole decoder.

Providers: `eager` writes the layer as one would, matmuls in the input dtype and the softmax in float32; `compile` is
torch.compile of that; `einsum` is the absorbed algebra in plain PyTorch; `kv_fused` projects the tokens and calls
`slot_attention`; `ours` is `slot_attention_absorbed`. eager to einsum is the gain of the algebra, einsum to ours that
of the kernel. The core takes queries that are in token space already, without any projection; its `copy` is a copy of
as many bytes. Of six blocks and the decoder, `ours` writes the tokens' gradient once for all blocks, `ours, each` per
block; `reference` is the decoder with `kernels="reference"`, float32 inside.

Counted bytes: everything that must cross memory once, inputs read and results written; a backward reads the inputs and
the output's gradient and writes those of the inputs. FLOPs: the absorbed form's, two products with the tokens forward
and five more backward. error: largest miss against float64, relative to the largest exact value; forward that of the
output, else the worst of the gradients (`errors`), per image on the first images of the timed batch, of weights on all
of it. saved: what autograd keeps between forward and backward besides the inputs; in six blocks the queries are none,
as every block makes its own.
"""

import copy
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import pytest
import torch
from torch import Tensor

from benchmarks.harness.bench import Bench
from benchmarks.harness.machine import ON_GPU
from benchmarks.harness.providers import compiled
from benchmarks.slot_attention.baselines import (
    eager,
    eager_core,
    eager_decoder,
    eager_with_map,
    einsum,
    entropy,
    kv_fused,
)
from benchmarks.slot_attention.goals import BACKWARD, BLOCK, BOTH, CORE, DECODER, FORWARD, SIX_BLOCKS, label
from eclip.kernels.slot_attention import share_tokens, slot_attention_absorbed
from eclip.kernels.slot_attention.ops import core
from eclip.model.instance_decoder import InstanceDecoder
from eclip.model.settings import ModelConfig

MODES = (FORWARD, BACKWARD, BOTH)
PROVIDERS: dict[str, Callable[..., Any]] = {
    "eager": eager,
    "compile": eager,
    "einsum": einsum,
    "kv_fused": kv_fused,
    "ours": slot_attention_absorbed,
}
# Name: B on a GPU, T, heads. On a CPU 1/256 of the images, with fewer and narrower tokens.
SHAPES = {
    "B4096": (4096, 20, 1),
    "B1024": (1024, 20, 1),
    "B256": (256, 20, 1),
    "4 heads": (1024, 20, 4),
    "12 heads": (1024, 20, 12),
    "T8": (1024, 8, 1),
    "T64": (1024, 64, 1),
}
NUM_TOKENS, DIM = (196, 768) if ON_GPU else (49, 48)
FEW = 8  # images whose results are compared with float64
DEPTH = 6


# --- One block --------------------------------------------------------------------------------------------------------


class Problem(NamedTuple):
    shape: str
    heads: int
    inputs: tuple[Tensor, Tensor, Tensor, Tensor]
    """q (B, T, D), tokens (B, N, D), w_key (D, D), w_value (D, D)"""
    grad_out: Tensor


@functools.lru_cache(maxsize=1)
def pose(name: str) -> Problem:
    """Inputs and output gradient of a named shape, the same each time; kept for the tests that follow on it."""
    batch, queries, heads = SHAPES[name]
    batch = batch if ON_GPU else batch // 256
    draw = Bench.draw
    tokens = draw(batch, NUM_TOKENS, DIM, seed=1)
    w_key, w_value = (draw(DIM, DIM, seed=seed) / math.sqrt(DIM) for seed in (2, 3))
    q, grad_out = (draw(batch, queries, DIM, seed=seed) for seed in (4, 5))
    return Problem(label(batch, NUM_TOKENS, queries, DIM, heads), heads, (q, tokens, w_key, w_value), grad_out)


@functools.cache
def exact(name: str) -> dict[str, Tensor]:
    """float64: output and gradients of the first images, and the weights' gradients over all of them."""
    problem = pose(name)
    q, tokens, *weights = problem.inputs
    weights = [w.double().requires_grad_() for w in weights]
    found: dict[str, Tensor] = {}
    for part in torch.arange(len(q), device=q.device).split(64):
        leaves = [x[part].double().requires_grad_() for x in (q, tokens)]
        out = eager(*leaves, *weights, num_heads=problem.heads)
        grads = torch.autograd.grad(out, [*leaves, *weights], problem.grad_out[part].double())
        if not found:
            found = {"out": out.detach()[:FEW], "q": grads[0][:FEW], "tokens": grads[1][:FEW]}
            found |= {"w_key": torch.zeros_like(grads[2]), "w_value": torch.zeros_like(grads[3])}
        found["w_key"] += grads[2]
        found["w_value"] += grads[3]
    return found


def note_errors(bench: Bench, expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    errors = {}
    for name, want in expected.items():
        if name in found:
            miss = found[name][: len(want)].double() - want
            errors[name] = float(miss.abs().max() / want.abs().max())
    bench.note(error=max(errors.values()), errors=errors)


def block_cells() -> Iterator[tuple[str, str, str]]:
    """(mode, shape, provider), forward first: a kernel that ends the process takes what comes after it along."""
    for mode in MODES:
        for shape in SHAPES:
            for provider in PROVIDERS:
                # A compile takes 10 to 40 s, and what it makes has no backward to be called twice.
                if provider != "compile" or (shape == "B4096" and mode != BACKWARD):
                    yield mode, shape, provider


@pytest.mark.parametrize("mode, shape, provider", list(block_cells()))
def test_block(bench: Bench, mode: str, shape: str, provider: str) -> None:
    problem = pose(shape)
    function = compiled(eager) if provider == "compile" else PROVIDERS[provider]

    def layer(*inputs: Tensor) -> Tensor:
        out: Tensor = function(*inputs, num_heads=problem.heads)
        return out

    traffic, work = block_cost(problem, mode)
    columns: dict[str, Any] = {"op": f"{BLOCK} {mode}", "provider": provider, "shape": problem.shape}
    columns |= {"bytes": traffic, "flops": work}
    if mode == FORWARD:
        with torch.no_grad():
            out = bench(lambda: layer(*problem.inputs), **columns)
        note_errors(bench, exact(shape), {"out": out})
        return
    columns |= bench.saved(layer, *problem.inputs, also=problem.inputs[2:], compiled=provider == "compile")
    backward = bench.backward_alone if mode == BACKWARD else bench.backward
    grads = bench(backward(layer, *problem.inputs, seeds=[problem.grad_out]), **columns)
    note_errors(bench, exact(shape), dict(zip(("q", "tokens", "w_key", "w_value"), grads, strict=True)))


def block_cost(problem: Problem, mode: str) -> tuple[int, int]:
    """Bytes that must move, and FLOPs of the absorbed form."""
    read = sum(x.nbytes for x in problem.inputs)
    batch, queries, dim = problem.inputs[0].shape
    with_tokens = 2 * batch * problem.heads * queries * problem.inputs[1].shape[1] * dim
    with_weights = 2 * batch * queries * dim * dim
    forward = (read + problem.grad_out.nbytes, 2 * with_tokens + 2 * with_weights)
    backward = (2 * read + problem.grad_out.nbytes, 5 * with_tokens + 4 * with_weights)
    return _add(forward, backward, mode)


def _add(forward: tuple[int, int], backward: tuple[int, int], mode: str) -> tuple[int, int]:
    if mode == BOTH:
        return forward[0] + backward[0], forward[1] + backward[1]
    return forward if mode == FORWARD else backward


# --- The core alone: the queries are in token space -------------------------------------------------------------------


def our_core(q: Tensor, tokens: Tensor, scale: float) -> Tensor:
    out: Tensor = core(q, tokens[:, None], None, None, None, scale, "den", 1e-6, None, False, False)[0]
    return out


CORES: dict[str, Callable[..., Tensor]] = {"ours": our_core, "eager": eager_core}


@pytest.mark.parametrize("provider", ["copy", "eager", "ours"])
@pytest.mark.parametrize("shape", ["B4096", "B256", "4 heads"])
@pytest.mark.parametrize("mode", [FORWARD, BACKWARD])
def test_core(bench: Bench, mode: str, shape: str, provider: str) -> None:
    problem = pose(shape)
    tokens = problem.inputs[1]
    batch, queries, dim = problem.grad_out.shape
    scale = 1 / math.sqrt(dim // problem.heads)
    q, grad_out = (bench.draw(batch, problem.heads, queries, dim, seed=seed) for seed in (6, 7))
    traffic, products = tokens.nbytes + 2 * q.nbytes, 2
    if mode == BACKWARD:
        traffic, products = 2 * tokens.nbytes + 3 * q.nbytes, 5
    columns: dict[str, Any] = {"op": f"{CORE} {mode}", "provider": provider, "shape": problem.shape, "bytes": traffic}
    if provider == "copy":
        source = bench.draw(traffic // 2 // q.itemsize, seed=8)
        target = torch.empty_like(source)
        bench(lambda: target.copy_(source), **columns)
        return
    columns["flops"] = products * 2 * q.numel() * tokens.shape[1]
    attend = functools.partial(CORES[provider], scale=scale)
    leaves = [x[:FEW].double().requires_grad_() for x in (q, tokens)]
    out = eager_core(leaves[0], leaves[1], scale)
    if mode == FORWARD:
        with torch.no_grad():
            note_errors(bench, {"out": out}, {"out": bench(lambda: attend(q, tokens), **columns)})
        return
    expected = torch.autograd.grad(out, leaves, grad_out[:FEW].double())
    columns |= bench.saved(attend, q, tokens)
    grads = bench(bench.backward_alone(attend, q, tokens, seeds=[grad_out]), **columns)
    names = ("q", "tokens")
    note_errors(bench, dict(zip(names, expected, strict=True)), dict(zip(names, grads, strict=True)))


# --- Six blocks: paper size everywhere, one image on a CPU, so that `saved` means the same there ----------------------

IMAGES = 1024 if ON_GPU else 1
PAPER_TOKENS, PAPER_QUERIES, PAPER_DIM = 196, 20, 768


@functools.lru_cache(maxsize=1)
def paper_inputs() -> tuple[Tensor, Tensor, Tensor]:
    """bf16 tokens (B, N, D), queries (B, T, D) and the gradient of such slots."""
    sizes = (PAPER_TOKENS, PAPER_QUERIES, PAPER_QUERIES)
    tokens, queries, grad_slots = (
        Bench.draw(IMAGES, size, PAPER_DIM, dtype=torch.bfloat16, seed=seed) for seed, size in enumerate(sizes)
    )
    return tokens, queries, grad_slots


def six_blocks(provider: str, tokens: Tensor, *rest: Tensor) -> Sequence[Tensor]:
    """What slot attention adds to six blocks: an update (B, T, D) each, and the mean entropy; rest: q, keys, values."""
    parts = list(zip(*(rest[i : i + DEPTH] for i in (0, DEPTH, 2 * DEPTH)), strict=True))
    if provider == "eager":
        found = [eager_with_map(q, tokens, w_key, w_value, 1) for q, w_key, w_value in parts]
        return [*(out for out, _ in found), torch.stack([entropy(assignment) for _, assignment in found]).mean()]
    ports: Sequence[Any] = [None] * DEPTH
    if provider == "ours":
        tokens, ports = share_tokens(tokens, DEPTH, num_queries=PAPER_QUERIES)
    calls = zip(parts, ports, strict=True)
    ours = [slot_attention_absorbed(q, tokens, *w, port=port, return_entropy=True) for (q, *w), port in calls]
    return [*(out for out, _ in ours), torch.cat([total for _, total in ours]).mean() / PAPER_TOKENS]


@pytest.mark.parametrize("provider", ["eager", "ours", "ours, each"])
def test_six_blocks(bench: Bench, provider: str) -> None:
    tokens, queries, grad_slots = paper_inputs()
    draw = functools.partial(bench.draw, dtype=tokens.dtype)
    q = [queries + draw(*queries.shape, seed=10 + block) for block in range(DEPTH)]
    weights = [draw(PAPER_DIM, PAPER_DIM, seed=20 + i) / math.sqrt(PAPER_DIM) for i in range(2 * DEPTH)]
    seeds = [*[grad_slots] * DEPTH, torch.ones((), device=bench.device)]

    def attend(*inputs: Tensor) -> Sequence[Tensor]:
        return six_blocks(provider, *inputs)

    # In a decoder every block makes its own queries, so they count as saved: leaves, but none of the inputs here.
    made = [x.detach().requires_grad_() for x in q]
    columns: dict[str, Any] = bench.saved(lambda tokens, *weights: attend(tokens, *made, *weights), tokens, *weights)
    bench(
        bench.backward(attend, tokens, *q, *weights, seeds=seeds),
        op=f"{SIX_BLOCKS} {BOTH}",
        provider=provider,
        shape=label(IMAGES, PAPER_TOKENS, PAPER_QUERIES, PAPER_DIM, 1),
        dtype=tokens.dtype,
        bytes=(2 * DEPTH + 1) * tokens.nbytes + DEPTH * 5 * queries.nbytes + 3 * sum(w.nbytes for w in weights),
        flops=DEPTH * IMAGES * 2 * PAPER_QUERIES * PAPER_DIM * (7 * PAPER_TOKENS + 6 * PAPER_DIM),
        rounds=None if ON_GPU else 1,
        **columns,
    )


@functools.cache
def decoder_of(kernels: Literal["auto", "reference"]) -> InstanceDecoder:
    torch.manual_seed(0)
    config = ModelConfig(
        embed_dim=PAPER_DIM, num_queries=PAPER_QUERIES, decoder_depth=DEPTH, decoder_heads=12, kernels=kernels
    )
    return InstanceDecoder(config).to(Bench.device, torch.bfloat16)


@functools.cache
def exact_decoder_gradients() -> dict[str, Tensor]:
    """float64 gradients of the first images' tokens and queries. The entropy is a mean over all images."""
    tokens, queries, grad_slots = (x[:FEW].double() for x in paper_inputs())
    leaves = [x.requires_grad_() for x in (tokens, queries)]
    outputs = eager_decoder(copy.deepcopy(decoder_of("auto")).double(), *leaves)
    share = torch.full((), len(tokens) / IMAGES, dtype=torch.float64, device=Bench.device)
    grads = torch.autograd.grad(outputs, leaves, (grad_slots, share))
    return dict(zip(("tokens", "queries"), grads, strict=True))


@pytest.mark.parametrize("provider", ["eager", "compile", "reference", "ours", "ours, compiled"])
def test_decoder(bench: Bench, provider: str) -> None:
    decoder = decoder_of("reference" if provider == "reference" else "auto")
    tokens, queries, grad_slots = paper_inputs()
    parameters = list(decoder.parameters())

    def decode(tokens: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
        if provider in ("eager", "compile"):
            return eager_decoder(decoder, tokens, queries)
        output = decoder(tokens, queries)
        return output.slots, output.entropy

    function = compiled(decode) if provider.endswith(("compile", "compiled")) else decode
    weights = sum(w.nbytes for w in parameters)
    columns: dict[str, Any] = bench.saved(function, tokens, queries, also=parameters, compiled=function is not decode)
    seeds = [grad_slots, torch.ones((), device=bench.device)]
    grads = bench(
        bench.backward(function, tokens, queries, seeds=seeds, also=parameters),
        op=f"{DECODER} {BOTH}",
        provider=provider,
        shape=label(IMAGES, PAPER_TOKENS, PAPER_QUERIES, PAPER_DIM, 1),
        dtype=tokens.dtype,
        bytes=(2 * DEPTH + 1) * tokens.nbytes + 3 * weights,
        flops=DEPTH * IMAGES * decoder_flops(),
        rounds=None if ON_GPU else 1,
        **columns,
    )
    if ON_GPU:  # on a CPU seconds, for what the tests check
        note_errors(bench, exact_decoder_gradients(), dict(zip(("tokens", "queries"), grads, strict=False)))


def decoder_flops() -> int:
    """Of a block and an image, forward and backward: slot attention's products, and 16 D x D products a query."""
    slots = 7 * 2 * PAPER_QUERIES * PAPER_TOKENS * PAPER_DIM
    among_queries = 3 * 4 * PAPER_QUERIES**2 * PAPER_DIM
    return slots + among_queries + 3 * 2 * 16 * PAPER_QUERIES * PAPER_DIM**2
