"""`Bench`, the `bench` fixture: time one call the same way everywhere, say what share of the hardware it uses.

    import pytest
    from benchmarks.harness.providers import PROVIDERS, provide
    from eclip.kernels.slot_attention import slot_attention, slot_attention_reference

    @pytest.mark.parametrize("provider", PROVIDERS)                       # "eager", "compile", "ours"
    def test_forward(bench, provider):
        b, n, t, d = bench.pick(gpu=(4096, 196, 20, 768), cpu=(4, 49, 20, 64))
        q, k, v = bench.randn(b, t, d), bench.randn(b, n, d), bench.randn(b, n, d)    # bench.device, bench.dtype
        attend = provide(provider, ours=slot_attention, reference=slot_attention_reference)
        bench(
            lambda: attend(q, k, v),
            op="slot_attention forward", provider=provider, shape=f"B={b} N={n} T={t} D={d}",
            bytes=(2 * b * n * d + 2 * b * t * d) * bench.dtype.itemsize,     # least traffic to and from memory
            flops=4 * b * n * t * d,                                          # least arithmetic, dense
        )

For a backward pass use `bench.backward(function, *inputs)`: a callable that runs forward and backward and returns the
gradients, `.grad` untouched; `bench.backward_alone` runs the forward once and its call is the backward through the
graph that it left. `bench.saved(function, *inputs)` says what that graph keeps. `bench(...)` returns what the call
returned, so a benchmark may check or `bench.note` an error: keyword arguments it does not know (`error=1e-3`) become
columns of the record, and `images=n` adds images/s. One `bench(...)` call a test. Running out of the GPU's memory skips
the test. `once=True` is for calls that take seconds: a single one, timed and watched for its memory, without warm-up.
`bench.race({"ours": call, "other": call}, op=..., shape=...)` times calls in turns (harness/race.py), a row each.

What is measured. On a GPU: device time between two CUDA events around one replay of a CUDA graph of the call (plain
launches with `graph=False`, for work on the host, and for calls that make the host wait, which a graph cannot hold; the
row says which), the L2 cache filled with other data before each of `rounds` rounds, by reading, which leaves nothing to
be written back in the timed part (by default 30 rounds, or as many as take two seconds but at least 3), after
`warmup` calls (of slow ones one); peak memory is what one call allocates above its inputs (and, for a backward alone,
above what its forward kept). Bandwidth and bf16 matmul rate are measured in the same session: `copy_share` = bytes /
time / bandwidth of a copy, and `share` = (the larger of bytes / bandwidth and flops / rate) / time, so that 100% means
as fast as a copy or a matmul on this very device. On a CPU: wall clock, few rounds, small shapes, no roofline: such a
row shows that the benchmark runs and nothing else, and says so.

Every row lands in pytest-benchmark's `extra_info` (--benchmark-json); `python -m benchmarks.report` makes the tables.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.activations import kept_for_backward
from benchmarks.harness.capture import capture, on_side_stream
from benchmarks.harness.clock import cuda_clock, rounds_for
from benchmarks.harness.goals import Row
from benchmarks.harness.machine import ON_GPU, synchronize
from benchmarks.harness.race import Race
from benchmarks.harness.race import rounds_for as race_rounds_for

CPU_NOTE = "CPU, small shape: shows that it runs; no roofline"
SLOW = 0.1  # seconds: a call that is warm after one


class Bench:
    """See the top of this file."""

    device = torch.device("cuda" if ON_GPU else "cpu")
    dtype = torch.bfloat16 if ON_GPU else torch.float32
    gpu = ON_GPU

    def __init__(self, benchmark: Any, roofline: dict[str, float], flush: Tensor | None) -> None:
        self._benchmark = benchmark
        self._roofline = roofline
        self._flush = flush
        self._drawn = 0

    def pick(self, *, gpu: Any, cpu: Any) -> Any:
        """The shape to use here: CPU shapes must run in well under a second."""
        return gpu if ON_GPU else cpu

    def randn(self, *shape: int, dtype: torch.dtype | None = None, seed: int | None = None) -> Tensor:
        """Standard normal data on the device, the same each session; every call of a test draws other data.

        Zeros would flatter: they toggle no wires.
        """
        self._drawn += 1
        return self.draw(*shape, dtype=dtype, seed=self._drawn if seed is None else seed)

    @classmethod
    def draw(cls, *shape: int, dtype: torch.dtype | None = None, seed: int) -> Tensor:
        """`randn` for data that several tests share."""
        generator = torch.Generator(cls.device).manual_seed(seed)
        data = torch.randn(shape, device=cls.device, dtype=torch.float32, generator=generator)
        return data.to(dtype or cls.dtype)

    def backward(
        self,
        function: Callable[..., Any],
        *inputs: Tensor,
        seeds: Sequence[Tensor] | None = None,
        also: Sequence[Tensor] = (),
    ) -> Callable[[], tuple[Tensor, ...]]:
        """A call that runs function(*inputs) forward and backward and returns the gradients of the inputs.

        seeds: gradients of what the function returns, a tensor or a tuple; standard normal by default. also: further
        leaves that want a gradient, such as parameters.
        """
        leaves, wanted = _leaves(inputs, also)
        if seeds is None:
            with torch.no_grad():
                seeds = [self.randn(*x.shape, dtype=x.dtype) for x in _outputs(function(*leaves))]

        def call() -> tuple[Tensor, ...]:
            return torch.autograd.grad(_outputs(function(*leaves)), wanted, seeds)

        return call

    def backward_alone(
        self, function: Callable[..., Any], *inputs: Tensor, seeds: Sequence[Tensor] | None = None
    ) -> Callable[[], tuple[Tensor, ...]]:
        """`backward` whose call starts from the graph of a forward that has run already, and keeps it.

        Not for functions of torch.compile, whose backward may use up what its forward saved.
        """
        leaves, wanted = _leaves(inputs)
        synchronize()
        with on_side_stream():
            outputs = _outputs(function(*leaves))
        synchronize()
        grads = [self.randn(*x.shape, dtype=x.dtype) for x in outputs] if seeds is None else seeds

        def call() -> tuple[Tensor, ...]:
            return torch.autograd.grad(outputs, wanted, grads, retain_graph=True)

        return call

    def saved(
        self, function: Callable[..., Any], *inputs: Tensor, also: Sequence[Tensor] = (), compiled: bool = False
    ) -> dict[str, int]:
        """Columns on what a forward of function(*inputs) leaves in memory.

        saved: bytes that autograd keeps for the backward, inputs and parameters (`also`) apart; not for what
        torch.compile made, which does not show them. held: on a GPU, by how much the allocator's bytes grew, results
        included.
        """
        leaves, wanted = _leaves(inputs, also)
        columns = {} if compiled else {"saved": kept_for_backward(lambda: function(*leaves), [*leaves, *wanted])}
        if ON_GPU:
            before = torch.cuda.memory_allocated()
            results = function(*leaves)
            synchronize()
            columns["held"] = torch.cuda.memory_allocated() - before
            del results
        return columns

    def note(self, **columns: Any) -> None:
        """Add columns to the record: what only the call's result told."""
        self._benchmark.extra_info.update(columns)

    def __call__(
        self,
        call: Callable[[], Any],
        *,
        op: str,
        provider: str,
        shape: str,
        bytes: int | None = None,
        flops: int | None = None,
        dtype: torch.dtype | None = None,
        rounds: int | None = None,
        warmup: int = 3,
        graph: bool = True,
        once: bool = False,
        images: int | None = None,
        **columns: Any,
    ) -> Any:
        """Time `call` and record a row; returns what the call returned. See the top of this file."""
        info = self._benchmark.extra_info
        info.update(op=op, provider=provider, shape=shape, dtype=str(dtype or self.dtype).removeprefix("torch."))
        info.update(bytes=bytes, flops=flops, **columns)
        if not ON_GPU:
            result = self._on_cpu(call, rounds)
        elif once:
            result = self._once(call)
        else:
            result = self._by_rounds(call, rounds, warmup, graph)
        if (median := self.seconds) is not None:
            if images:
                info["images_per_s"] = images / median
            self._rate(median, bytes, flops, info)
        return result

    @property
    def timed(self) -> bool:
        """Whether anything is timed: False with --benchmark-disable, for which the least work will do."""
        return bool(self._benchmark.enabled)

    def remark(self, text: str) -> None:
        """Add a line to the page: what could not be measured, and why."""
        self._benchmark.extra_info.setdefault("remarks", []).append(text)

    def race(
        self, calls: Mapping[str, Callable[[], Any]], *, op: str, shape: str, dtype: str, seconds: float, **columns: Any
    ) -> list[Row]:
        """Time `calls` in turns for about `seconds` by wall clock; a row each, ratios to the first one's."""
        race, rounds = Race(calls), 1
        if self.timed:
            race.turn()  # fills caches
            rounds = race_rounds_for(sum(times[0] for times in race.times.values()), seconds)
            race.forget()
        self._benchmark.pedantic(race.turn, rounds=rounds)
        device = torch.cuda.get_device_name() if ON_GPU else "cpu"
        fixed = {"op": op, "shape": shape, "dtype": dtype, "device": device, "timing": "in turns", **columns}
        rows = [{**fixed, **row} for row in race.rows()]
        self._benchmark.extra_info["rows"] = rows
        load = ", ".join(f"{load:.1f}" for load in os.getloadavg())
        self.remark(f"{op}: load average after the race {load} (1, 5, 15 minutes)")
        return rows

    def _on_cpu(self, call: Callable[[], Any], rounds: int | None) -> Any:
        self._benchmark.extra_info.update(device="cpu", timing="wall clock", note=CPU_NOTE)
        return self._benchmark.pedantic(call, rounds=rounds or 3, warmup_rounds=1)

    def _once(self, call: Callable[[], Any]) -> Any:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = self._benchmark.pedantic(call, rounds=1)
        torch.cuda.synchronize()
        info = self._benchmark.extra_info
        info.update(device=torch.cuda.get_device_name(), timing="one launch")
        info.update(peak_bytes=torch.cuda.max_memory_allocated() - before)
        return result

    def _by_rounds(self, call: Callable[[], Any], rounds: int | None, warmup: int, graph: bool) -> Any:
        call()  # compiles, and fills the allocator's caches
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        start = cuda_clock()
        result = call()
        seconds = cuda_clock() - start
        info = self._benchmark.extra_info
        info.update(device=torch.cuda.get_device_name(), peak_bytes=torch.cuda.max_memory_allocated() - before)
        del result
        warmup = 1 if seconds > SLOW else warmup
        replay, timing = capture(call, warmup) if graph else (call, "launches")
        info.update(timing=timing)
        # The flush also keeps the GPU busy while the CPU enqueues the round: no launch gap between the events.
        return self._benchmark.pedantic(
            replay, setup=self._refill_l2, rounds=rounds or rounds_for(seconds), warmup_rounds=warmup
        )

    @property
    def seconds(self) -> float | None:
        """Median of the rounds; None before they ran and with --benchmark-disable."""
        return self._benchmark.stats.stats.median if self._benchmark.stats else None

    def _refill_l2(self) -> None:
        assert self._flush is not None
        self._flush.sum()  # writing would leave 50 to 60 MB that the timed call has to write back: 12 to 17 µs

    def _rate(self, seconds: float, bytes: int | None, flops: int | None, info: dict[str, Any]) -> None:
        info["seconds"] = seconds
        if bytes:
            info["gb_per_s"] = bytes / seconds / 1e9
            if self._roofline:
                info["copy_share"] = bytes / seconds / self._roofline["copy_bytes_per_s"]
        if flops:
            info["tflop_per_s"] = flops / seconds / 1e12
        if self._roofline and (bytes or flops):
            memory = (bytes or 0) / self._roofline["copy_bytes_per_s"]
            compute = (flops or 0) / self._roofline["matmul_flops_per_s"]
            info.update(share=max(memory, compute) / seconds, bound="memory" if memory > compute else "compute")


def _leaves(inputs: Sequence[Tensor], also: Sequence[Tensor] = ()) -> tuple[list[Tensor], list[Tensor]]:
    """Fresh leaves on the inputs' memory, and all that want a gradient."""
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    return leaves, [*(x for x in leaves if x.requires_grad), *also]


def _outputs(result: Any) -> Sequence[Tensor]:
    return (result,) if isinstance(result, Tensor) else result
