"""The machine that a number is from."""

import datetime
import subprocess

import torch

ON_GPU = torch.cuda.is_available()


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if ON_GPU:
        torch.cuda.synchronize()


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
