"""The machine that a number is from."""

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

ON_GPU = torch.cuda.is_available()


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if ON_GPU:
        torch.cuda.synchronize()


def versions() -> dict[str, str]:
    """Device, package versions, commit and date: without them a number means nothing."""
    found = {"device": torch.cuda.get_device_name() if ON_GPU else "cpu", "torch": torch.__version__}
    found |= {
        "processor": _processor(),
        "threads": str(torch.get_num_threads()),
        "transformers": _version("transformers"),
    }
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


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _processor() -> str:
    """The processor's name and how many cores of it this process may use."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    name = found[1] if found else platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} cores of {name}"
