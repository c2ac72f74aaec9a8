"""The `bench` fixture: time one call the same way everywhere and say what share of the hardware it uses.

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

import datetime
import functools
import gc
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.harness.activations import kept_for_backward

ON_GPU = torch.cuda.is_available()
CPU_NOTE = "CPU, small shape: shows that it runs; no roofline"
ROUNDS, ROUNDS_SECONDS = 30, 2.0  # of a row on a GPU: whichever is reached first
SLOW = 0.1  # seconds: a call that is warm after one


class CudaTime:
    """A point in the GPU's time; the difference of two is seconds."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, start: "CudaTime") -> float:
        self.event.synchronize()
        return start.event.elapsed_time(self.event) / 1e3


def cuda_clock() -> CudaTime:
    """pytest-benchmark's timer on a GPU."""
    return CudaTime()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if ON_GPU:
        for item in items:
            item.add_marker(pytest.mark.benchmark(timer=cuda_clock))


@functools.cache
def side_stream() -> torch.cuda.Stream:
    """Where calls are warmed up and captured. One for all: a backward runs on the stream of its forward."""
    return torch.cuda.Stream()


def _synchronize() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def on_side_stream() -> AbstractContextManager[object]:
    return torch.cuda.stream(side_stream()) if ON_GPU else nullcontext()


def host_waits(call: Callable[[], Any]) -> bool:
    """Whether `call` makes the host wait for the GPU (`.item()`, `.nonzero()`...), so that no graph can hold it."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


class Captures:
    """Whether this process can still capture."""

    broken = ""
    """Why not: torch 2.11 never ends a capture that failed, and refuses all later ones, and to give memory back."""


def capture(call: Callable[[], Any], warmup: int) -> tuple[Callable[[], Any], str]:
    """Warm `call` up and capture it in a CUDA graph. Returns (replay or the call itself, how it is launched)."""
    if Captures.broken:
        return call, f"launches ({Captures.broken})"
    if host_waits(call):
        return call, "launches (the host waits)"
    stream = side_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warmup):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            result = call()
    except RuntimeError as error:
        torch.cuda.synchronize()
        side_stream.cache_clear()  # what follows starts on a stream that no failed capture has touched
        if not give_back_memory():
            Captures.broken = "an earlier capture failed"
        return call, f"launches (capture failed: {str(error).splitlines()[0][:80]})"

    def replay() -> Any:
        graph.replay()
        return result

    return replay, "graph"


def give_back_memory() -> bool:
    """Return what no tensor holds to the GPU; False where a capture that failed does not let torch do so."""
    try:
        torch.cuda.empty_cache()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return False
    return True


def rounds_for(seconds: float) -> int:
    """How often to time a call that takes as long."""
    return max(3, min(ROUNDS, int(ROUNDS_SECONDS / seconds)))


def median_seconds(call: Callable[[], Any], rounds: int = 20) -> float:
    """Median device time of one replay of `call`."""
    replay, _ = capture(call, warmup=3)
    spans = []
    for _ in range(rounds):
        replay()  # keeps the GPU busy while the CPU enqueues the round: no launch gap between the events
        start = cuda_clock()
        replay()
        spans.append(cuda_clock() - start)
    return sorted(spans)[rounds // 2]


def measure_roofline() -> dict[str, Any]:
    """Bandwidth of a 1 GiB copy and rate of an 8192^3 bf16 matmul of random data, on the current GPU."""
    source = torch.empty(2**29, dtype=torch.bfloat16, device="cuda").normal_()
    target = torch.empty_like(source)
    copy = median_seconds(lambda: target.copy_(source))
    a, b = source[: 2**26].view(8192, 8192), source[2**26 : 2**27].view(8192, 8192)
    out = target[: 2**26].view(8192, 8192)
    matmul = median_seconds(lambda: torch.mm(a, b, out=out))
    return {"copy_bytes_per_s": 2 * source.nbytes / copy, "matmul_flops_per_s": 2 * 8192**3 / matmul}


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
        _synchronize()
        with on_side_stream():
            outputs = _outputs(function(*leaves))
        _synchronize()
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
            _synchronize()
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
            info.update(device="cpu", timing="wall clock", note=CPU_NOTE)
            result = self._benchmark.pedantic(call, rounds=rounds or 3, warmup_rounds=1)
        elif once:
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            result = self._benchmark.pedantic(call, rounds=1)
            torch.cuda.synchronize()
            info.update(device=torch.cuda.get_device_name(), timing="one launch")
            info.update(peak_bytes=torch.cuda.max_memory_allocated() - before)
        else:
            call()  # compiles, and fills the allocator's caches
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            start = cuda_clock()
            result = call()
            seconds = cuda_clock() - start
            info.update(device=torch.cuda.get_device_name(), peak_bytes=torch.cuda.max_memory_allocated() - before)
            del result
            warmup = 1 if seconds > SLOW else warmup
            replay, timing = capture(call, warmup) if graph else (call, "launches")
            info.update(timing=timing)
            # The flush also keeps the GPU busy while the CPU enqueues the round: no launch gap between the events.
            result = self._benchmark.pedantic(
                replay, setup=self._refill_l2, rounds=rounds or rounds_for(seconds), warmup_rounds=warmup
            )
        if (median := self.seconds) is not None:
            if images:
                info["images_per_s"] = images / median
            self._rate(median, bytes, flops, info)
        return result

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


ROOFLINE = pytest.StashKey[dict[str, Any]]()


@pytest.fixture(scope="session")
def roofline(request: pytest.FixtureRequest) -> dict[str, Any]:
    """{"copy_bytes_per_s", "matmul_flops_per_s"} of this GPU in this session; {} on a CPU."""
    measured = measure_roofline() if ON_GPU else {}
    request.config.stash[ROOFLINE] = measured
    return measured


@pytest.fixture(scope="session")
def _flush() -> Tensor | None:
    # Four times the 60 MB of an H200's L2: what the previous round read is gone, and what it wrote is written back.
    return torch.zeros(64 << 20, dtype=torch.float32, device="cuda") if ON_GPU else None


@pytest.fixture
def bench(benchmark: Any, roofline: dict[str, float], _flush: Tensor | None) -> Iterator[Bench]:
    """Time one call; see the top of this file."""
    yield Bench(benchmark, roofline, _flush)
    if ON_GPU:  # the memory of this test's graph belongs to the next test
        gc.collect()
        give_back_memory()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Too large for this GPU is no failure. A new exception: the old one's frames would hold the memory."""
    try:
        return (yield)
    except torch.OutOfMemoryError as error:
        message = str(error).splitlines()[0]
    pytest.skip(f"out of memory: {message}")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.update(versions())


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]) -> None:
    output_json["roofline"] = config.stash.get(ROOFLINE, {})


def versions() -> dict[str, str]:
    """Device, package versions, commit and date: without them a number means nothing."""
    found = {"device": torch.cuda.get_device_name() if ON_GPU else "cpu", "torch": torch.__version__}
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        found["triton"] = "none"
    try:
        git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)
        found["commit"] = git.stdout.strip() or "unknown"
    except FileNotFoundError:
        found["commit"] = "unknown"
    found["date"] = datetime.date.today().isoformat()
    return found
