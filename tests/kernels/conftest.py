"""Kernel tests run on up to three paths: PyTorch on the CPU, the Triton kernel interpreted, the kernel on a GPU."""

import pytest
import torch
from triton import knobs

from eclip.kernels import launch
from eclip.kernels.contrastive import triton_backward, triton_forward
from tests.kernels import bf16_interp


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Triton 3.6 makes an int of a 1-element array, which numpy < 2.4 still allows.
    for item in items:
        if "interpreter" in item.name or "interpreter" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"))


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """CPU tensors go through the Triton kernels, interpreted, bf16 included. Keep sizes tiny: ~50 us a program."""
    if not knobs.runtime.interpret:
        pytest.skip("the process was not started with TRITON_INTERPRET=1 (on a GPU machine the kernels compile)")
    bf16_interp.install()
    monkeypatch.setattr(launch, "interpret_on_cpu", True)
    return torch.device("cpu")


@pytest.fixture(params=["cpu", "interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def path(request: pytest.FixtureRequest) -> torch.device:
    """Every path in turn: the device to put a test's tensors on."""
    if request.param == "interpreter":
        return request.getfixturevalue("interpreter")
    return torch.device(request.param)


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The paths that launch kernels, in turn."""
    if request.param == "interpreter":
        return request.getfixturevalue("interpreter")
    return torch.device(request.param)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Contrastive losses: buffers so small that a batch of 300 takes several panels of rows and several blocks of G."""
    monkeypatch.setattr(triton_forward, "_PANEL_NUMBERS", 200)
    monkeypatch.setattr(triton_forward, "_PROGRAMS", 1)
    monkeypatch.setattr(triton_backward, "_BLOCK_ROWS", 64)
    monkeypatch.setattr(triton_backward, "_BLOCK_BYTES", 1)
