"""What a GPU can do at best, and what memory was taken at most."""

import re
import resource
import sys

import torch

PEAK_FLOPS: tuple[tuple[str, float], ...] = (
    ("A100", 312e12), ("A800", 312e12), ("A10", 125e12), ("A30", 165e12), ("A40", 150e12), ("RTX A6000", 155e12),
    ("H100 PCIe", 756e12), ("H100 NVL", 835e12), ("H100", 989e12), ("H800 PCIe", 756e12), ("H800", 989e12),
    ("H200 NVL", 836e12), ("H200", 989e12), ("GH200", 989e12), ("H20", 148e12),
    ("B200", 2250e12), ("GB200", 2500e12),
    ("L40S", 362e12), ("L40", 181e12), ("L20", 119.5e12), ("L4", 121e12), ("RTX 6000 Ada", 364e12),
)  # fmt: skip
"""Dense bfloat16 peak, FLOP/s (NVIDIA's data sheets), of a GPU whose name has all of these words; the first counts."""
_PART_OF_A_GPU = re.compile(r"MIG|GRID|\d+[ABCQ]")  # a slice, or a virtual GPU's profile ("A100-20C")


def peak_flops(device: torch.device) -> float | None:
    """Dense bfloat16 peak of a known GPU, FLOP/s; None for others and for CPUs."""
    if device.type != "cuda":
        return None
    return named_peak(torch.cuda.get_device_name(device))


def named_peak(name: str) -> float | None:
    """Peak of a GPU by the whole words of its name: an L40 is no L4. None for unknown ones and for slices of one."""
    words = set(re.split(r"[\s_-]+", name))
    if any(_PART_OF_A_GPU.fullmatch(word) for word in words):
        return None
    return next((peak for wanted, peak in PEAK_FLOPS if words.issuperset(wanted.split())), None)


def peak_memory(device: torch.device) -> int:
    """Bytes at the peak: what PyTorch allocated on the GPU, or this process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
