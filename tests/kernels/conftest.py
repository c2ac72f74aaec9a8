"""Kernel tests run on up to three paths: PyTorch on the CPU, the Triton kernel interpreted, the kernel on a GPU."""

import pytest
import torch
from triton import knobs

from eclip.kernels import _launch
from tests.kernels import bf16_interp


@pytest.fixture
def interpreter(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """CPU tensors go through the Triton kernels, interpreted, bf16 included. Keep sizes tiny: ~50 us a program."""
    if not knobs.runtime.interpret:
        pytest.skip("the process was not started with TRITON_INTERPRET=1 (on a GPU machine the kernels compile)")
    # Triton 3.6 turns 1-element arrays into ints, which numpy < 2.4 still allows.
    request.node.add_marker(pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"))
    bf16_interp.install()
    monkeypatch.setattr(_launch, "interpret_on_cpu", True)
    return torch.device("cpu")


@pytest.fixture(params=["cpu", "interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def path(request: pytest.FixtureRequest) -> torch.device:
    """Every path in turn: the device to put a test's tensors on."""
    if request.param == "interpreter":
        return request.getfixturevalue("interpreter")
    return torch.device(request.param)
