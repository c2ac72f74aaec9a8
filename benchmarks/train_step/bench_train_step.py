"""A training step: ours, our model on the reference ops, the same model written on transformers, and open_clip's.

On a GPU, vit_b16 with the real losses: every option of a step, micro-batches, a batch of 16k products, attention of the
titles, and where the time goes. `mfu` is model FLOPs over time over the data sheet's dense bf16 peak: the FLOPs are
those of our step on a whole batch, our kernels' among them, for every provider and option alike, so that work done
twice does not count (open_clip's, another model, by its own). Steps are launched as training launches them, without a
CUDA graph. Memory is what the allocator held at the peak, weights and optimizer included.

On a CPU, the demo's two presets in their real size, all providers in turns within one session: ratios of one run. The
GPU's tests run there too, on a tiny model, and show only that they run.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.harness.bench import Bench
from benchmarks.train_step import goals, kinds
from benchmarks.train_step.batches import make_parts
from benchmarks.train_step.goals import label
from benchmarks.train_step.open_clip_step import OpenClipStep
from benchmarks.train_step.steps import OurStep, Step, make_step
from eclip.config import RunConfig
from eclip.model.settings import ModelConfig
from eclip.parallel.settings import ComputeConfig
from eclip.presets import PRESETS
from eclip.training.metrics.flops import ModelFlops
from eclip.training.metrics.peaks import peak_flops

RACE_SECONDS = 90.0
BATCH = 256
"""Of the options: unsplit, in fp32 residuals, it fits into 40 GB."""
FAST = ComputeConfig(compile=True, residual="bf16")
OPTIONS = {
    "ours": ComputeConfig(),
    "ours, bf16 residual": ComputeConfig(residual="bf16"),
    "ours, compiled": ComputeConfig(compile=True),
    "ours, compiled, bf16 residual": FAST,
    "ours, compiled, bf16 residual, blocks again": dataclasses.replace(FAST, activation_checkpointing="blocks"),
    "ours, compiled, bf16 residual, selective": dataclasses.replace(FAST, activation_checkpointing="selective"),
    "ours, blocks again": ComputeConfig(activation_checkpointing="blocks"),
}
TINY = ModelConfig(
    image_size=32, patch_size=8, vision_width=32, vision_depth=2, vision_heads=2, vocab_size=256, text_width=32,
    text_depth=2, text_heads=2, max_positions=64, embed_dim=32, num_queries=4, decoder_depth=2, decoder_heads=2,
)  # fmt: skip


def a_run(bench: Bench, batch: int, compute: ComputeConfig, micro_batch: int | None = None) -> RunConfig:
    """vit_b16 on a GPU; on a CPU a tiny model, a 64th of the products (64 at most), and nothing compiled."""
    config = dataclasses.replace(PRESETS["vit_b16"], global_batch_size=batch, micro_batch=micro_batch, compute=compute)
    if bench.gpu:
        return config
    return dataclasses.replace(
        config,
        model=TINY,
        global_batch_size=min(64, max(4, batch // 64)),
        micro_batch=micro_batch and max(1, micro_batch // 64),
        compute=dataclasses.replace(compute, compile=False),
    )


@functools.cache
def flops_a_product(model: ModelConfig, device: torch.device) -> float:
    """Of forward and backward of our step on a whole batch, nothing computed twice."""
    config = dataclasses.replace(PRESETS["vit_b16"], model=model, global_batch_size=32, evaluate=False)
    step, parts = OurStep(config, device), make_parts(config, device)
    with ModelFlops() as counter:
        step.losses_and_gradients(parts)
    return counter.total / config.global_batch_size


def measure(
    bench: Bench, call: Step, config: RunConfig, *, op: str, provider: str, flops: float | None = None, **options: Any
) -> Any:
    """Time a step and add its share of the peak, and its memory."""
    batch = config.global_batch_size
    flops = flops_a_product(config.model, bench.device) * batch if flops is None else flops
    micro_batch = config.micro_batch if config.micro_batch != batch else None
    shape = label(batch, micro_batch)
    found = bench(
        call, op=op, provider=provider, shape=shape, flops=round(flops), graph=False, products=batch, **options
    )
    if bench.gpu:
        bench.note(memory_gb=torch.cuda.max_memory_allocated() / 1e9)
    peak = peak_flops(bench.device)
    if peak is not None and bench.seconds is not None:
        bench.note(mfu=flops / bench.seconds / peak)
    return found


def all_finite(losses: dict[str, torch.Tensor]) -> bool:
    return all(math.isfinite(value.item()) for value in losses.values())


# --- On a GPU; on a CPU with a tiny model -----------------------------------------------------------------------------


@pytest.mark.parametrize("option", OPTIONS)
def test_option(bench: Bench, option: str) -> None:
    if OPTIONS[option].compile:
        compiles(bench)
    config = a_run(bench, BATCH, OPTIONS[option])
    assert all_finite(
        measure(bench, make_step("ours", config, bench.device), config, op=goals.OPTIONS, provider=option)
    )


def compiles(bench: Bench) -> None:
    """Skip the test on a CPU; on a GPU forget what other shapes compiled, as a run has one."""
    if not bench.gpu:
        pytest.skip("compiled blocks are timed on GPUs only: on a CPU their first call takes minutes")
    torch._dynamo.reset()


@pytest.mark.parametrize("provider", ["reference", "plain"])
def test_peer(bench: Bench, provider: str) -> None:
    config = a_run(bench, BATCH, ComputeConfig())
    call = or_skip(lambda: make_step(provider, config, bench.device))
    assert all_finite(measure(bench, call, config, op=goals.OPTIONS, provider=provider))


def test_open_clip(bench: Bench) -> None:
    if not bench.gpu:
        pytest.skip("open_clip's ViT-B-16 takes seconds a step on a CPU")
    config = a_run(bench, BATCH, ComputeConfig())
    call = or_skip(lambda: OpenClipStep(config, bench.device))
    with ModelFlops() as counter:
        call.losses_and_gradients()
    call.optimizer.zero_grad()
    total = float(counter.total)
    measure(bench, call, config, op=goals.OPTIONS, provider="open_clip", flops=total, note="another, smaller model")


def or_skip(make: Callable[[], Any]) -> Any:
    """What `make` makes; skips the test where a peer's package is missing."""
    try:
        return make()
    except ImportError as error:
        pytest.skip(f"not installed: {error}")


def test_large_batch(bench: Bench) -> None:
    """The first step compiles and is not timed; the second is timed once."""
    config = a_run(bench, goals.LARGE_BATCH, FAST, 512)
    if config.compute.compile:
        compiles(bench)
    call = make_step("ours", config, bench.device)
    call()
    measured = measure(
        bench, call, config, op=goals.LARGE, provider="ours, compiled, bf16 residual", once=True, warmup=0
    )
    assert all_finite(measured)


@pytest.mark.parametrize("micro_batch", [64, 128, 256, 512])
def test_micro_batch(bench: Bench, micro_batch: int) -> None:
    config = a_run(bench, 1024, FAST, micro_batch)
    if config.compute.compile:
        compiles(bench)
    call = make_step("ours", config, bench.device)
    assert all_finite(measure(bench, call, config, op=goals.MICRO, provider="ours, compiled, bf16 residual", warmup=1))


@pytest.mark.parametrize("kernel", ["varlen", "xformers", "padded"])
def test_text_attention(bench: Bench, kernel: Any) -> None:
    config = a_run(bench, BATCH, ComputeConfig(text_attention=kernel))
    try:
        call = make_step("ours", config, bench.device)
    except ValueError as error:
        pytest.skip(str(error))
    assert all_finite(measure(bench, call, config, op=goals.TEXT, provider=f"ours, {kernel}"))


@pytest.mark.parametrize("option", ["ours", "ours, compiled, bf16 residual"])
def test_where_the_time_goes(bench: Bench, option: str) -> None:
    if OPTIONS[option].compile:
        compiles(bench)
    config = a_run(bench, BATCH, OPTIONS[option])
    call = make_step("ours", config, bench.device)
    measure(bench, call, config, op=goals.KINDS, provider=option)
    parts = kinds.shares(call, bench.device)
    assert math.isclose(sum(parts.values()), 1.0)
    bench.note(**{kind: f"{share:.1%}" for kind, share in parts.items()})


# --- On a CPU: the demo, in its real size -----------------------------------------------------------------------------


@pytest.mark.parametrize("preset", goals.DEMO)
def test_demo(bench: Bench, preset: Any) -> None:
    if bench.gpu:
        pytest.skip("the demo's steps are for CPUs")
    config = PRESETS[preset]
    if not bench.timed:  # a plain test: that it runs
        config = dataclasses.replace(config, global_batch_size=16)
    split = dataclasses.replace(config, micro_batch=config.global_batch_size // 4)
    calls = {name: make_step(name, config, bench.device) for name in ("ours", "reference")}
    try:
        calls["plain"] = make_step("plain", config, bench.device)
    except ImportError as error:
        bench.remark(f"{preset}: the model on transformers was not measured: {error}")
    calls["ours, four micro-batches"] = make_step("ours", split, bench.device)
    shape = label(config.global_batch_size) + (", features given" if config.cache_features else "")
    bench.race(calls, op=goals.DEMO[preset], shape=shape, dtype="float32", seconds=RACE_SECONDS)
