"""The ahead-of-time compile check: the configurations of the default decoder compile, and mistakes are named.

CI compiles every listed call for every architecture (`python -m eclip.kernels.compile_check`); here, a few.
"""

import os
import subprocess
import sys

import pytest

from tests.helpers import ROOT


def compile_check(*args: str, interpret: bool = False) -> subprocess.CompletedProcess[str]:
    """Run the check in a process of its own, with Triton compiling or (a mistake) interpreting."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": str(ROOT)} | ({"TRITON_INTERPRET": "1"} if interpret else {})
    command = [sys.executable, "-m", "eclip.kernels.compile_check", *args]
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=230)


@pytest.mark.parametrize("arch", ["80", "90", "100"])
def test_decoder_compiles(arch: str) -> None:
    """The paper's sizes, of one block and of six: no spills, shared memory within the chip, tensor cores in use."""
    for call in ("slot_attention entropy", "slot_attention entropy calls=6"):
        result = compile_check("--arch", arch, "--call", call)
        assert result.returncode == 0, result.stdout + result.stderr
        assert "3 kernels, 0 failed" in result.stdout


@pytest.mark.parametrize("arch", ["80", "90", "100"])
def test_contrastive_loss_compiles(arch: str) -> None:
    """L_itc: no spills; wgmma on sm_90, which its report would otherwise miss."""
    result = compile_check("--arch", arch, "--call", "contrastive", "--only", "wd_kernel")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "4 kernels, 0 failed" in result.stdout


def test_random_calls_are_compiled() -> None:
    """Beside the listed ones, and called so that their lines can be repeated."""
    result = compile_check("--arch", "90", "--sweep", "3", "--only", "random: contrastive")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "random: contrastive " in result.stdout


def test_slow_compilation_fails() -> None:
    result = compile_check("--arch", "90", "--call", "slot_attention queries=1 dim=16", "--timeout", "0.001")
    assert result.returncode == 1
    assert "did not compile within 0.001 s" in result.stdout


@pytest.mark.parametrize(
    ("args", "interpret", "message"),
    [
        ((), True, "TRITON_INTERPRET is set"),
        (("--only", "nothing"), False, "no kernel"),
        (("--call", "slot_attention queeries=3"), False, "'queeries' is nothing that slot_attention takes"),
        (("--call", "attention"), False, "'attention' is no op"),
        (("--call", "slot_attention queries=many"), False, "queries=many: queries is a whole number"),
        (("--call", "contrastive dtype=int8"), False, "dtype=int8: choose from bfloat16"),
        (("--jobs", "0"), False, "--jobs 0"),
    ],
)
def test_mistakes_are_named(args: tuple[str, ...], interpret: bool, message: str) -> None:
    result = compile_check(*args, interpret=interpret)
    assert result.returncode == 2
    assert message in result.stderr
