"""Where the time of a step goes: the profiler's events by kind.

On a GPU the kernels' own time and what is left of the wall, in which the GPU is idle; on a CPU the operators' own time,
and what is left is Python's.
"""

import re
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

KINDS: tuple[tuple[str, str], ...] = (
    ("our kernels", r"_contrastive_\w+_kernel|slot_attention_|eclip::"),
    ("optimizer", r"adam|multi_tensor_apply|foreach|lerp|muon"),
    ("attention", r"flash|fmha|attention|cudnn_generated_fort_native_sdpa"),
    ("GEMM", r"gemm|cutlass|nvjet|xmma|cublas|splitk|::(add)?mm\b|::(b|badd)bmm\b|::bmm\b|::linear|conv"),
    ("norm", r"layer_?norm|GammaBeta"),
    ("casts and layouts", r"direct_copy|float16_copy|::copy_|::_?to_copy|::contiguous|::clone"),
    ("copies", r"memcpy|memset|CatArrayBatchedCopy|::cat\b"),
    ("indexing", r"index|gather|scatter|embedding|sort|compact|nonzero"),
)
"""Kind and what a name has in it; the first counts. All else is ELEMENTWISE."""
ELEMENTWISE = "elementwise and reductions"
REST = "idle"
NAMES = (*(kind for kind, _ in KINDS), ELEMENTWISE, REST)
_RANGES = re.compile(r"^(Optimizer\.|ProfilerStep|nn\.Module|## |aot|Torch-Compiled|CompiledFunction)")
"""Named ranges that older versions do not mark as such."""
_OPERATOR = re.compile(r"^(?!autograd::)\w+::")


def kind_of(name: str) -> str:
    """The kind of a kernel or an operator."""
    return next((kind for kind, names in KINDS if re.search(names, name, re.IGNORECASE)), ELEMENTWISE)


def shares(call: Callable[[], Any], device: torch.device, *, steps: int = 3) -> dict[str, float]:
    """Share of the wall by kind, of `steps` calls that are warm; the sum is 1."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, acc_events=True) as found:
        began = time.perf_counter()
        for _ in range(steps):
            call()
        if on_gpu:
            torch.cuda.synchronize(device)
        wall = (time.perf_counter() - began) * 1e6
    if on_gpu:
        return of_kernels(
            (event.name, event.time_range.start, event.time_range.end)
            for event in found.events()
            if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
        )
    own = [(event.key, float(event.self_cpu_time_total)) for event in found.key_averages()]
    return _normalised(((name, microseconds) for name, microseconds in own if _OPERATOR.match(name)), wall)


def of_kernels(events: Iterable[tuple[str, float, float]]) -> dict[str, float]:
    """Shares of kernels (name, start, end), of the time from the first one's start to the last one's end.

    Streams may overlap: a moment counts for the kernel that began first, so that the shares add up.
    """
    ordered = sorted((event for event in events if not _RANGES.match(event[0])), key=lambda event: event[1])
    if not ordered:
        return dict.fromkeys(NAMES, 0.0) | {REST: 1.0}
    reached = first = ordered[0][1]
    own = []
    for name, start, end in ordered:
        own.append((name, max(0.0, end - max(start, reached))))
        reached = max(reached, end)
    return _normalised(own, reached - first)


def _normalised(own: Iterable[tuple[str, float]], wall: float) -> dict[str, float]:
    total = dict.fromkeys(NAMES, 0.0)
    for name, microseconds in own:
        total[kind_of(name)] += microseconds
    total[REST] = max(0.0, wall - sum(total.values()))
    whole = sum(total.values()) or 1.0
    return {kind: value / whole for kind, value in total.items()}
