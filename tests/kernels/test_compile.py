"""The ahead-of-time compile check: the configurations of the default decoder compile, and faults are seen.

CI compiles every configuration for every architecture (`python -m eclip.kernels.compile_check`); here, a few.
"""

import dataclasses
import os
import subprocess
import sys

import pytest

from eclip.kernels.compile_check import Report, all_cases
from tests.helpers import ROOT


def compile_check(*args: str, interpret: bool = False) -> subprocess.CompletedProcess[str]:
    """Run the check in a process of its own, with Triton compiling or (a mistake) interpreting."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": str(ROOT)} | ({"TRITON_INTERPRET": "1"} if interpret else {})
    command = [sys.executable, "-m", "eclip.kernels.compile_check", *args]
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=230)


def test_decoder_configurations_compile() -> None:
    """The paper's sizes, on sm_90: no spills, shared memory within the chip, tensor cores in use."""
    result = compile_check("--arch", "90", "--only", "slot_attention fwd bfloat16 T=20 D=768")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "7 configurations, 0 failed" in result.stdout


def test_contrastive_configurations_compile() -> None:
    """The batches of L_itc on sm_90: no spills, wgmma."""
    result = compile_check("--arch", "90", "--only", "wd bfloat16 both diagonal")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "1 configurations, 0 failed" in result.stdout


@pytest.mark.parametrize("arch", ["80", "90", "100"])
def test_launched_kernels_compile(arch: str) -> None:
    """As Triton specialises them in real calls of the decoder, rather than as the compile check describes them."""
    script = ROOT / "tests" / "kernels" / "launches.py"
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, str(script), arch], env=env, capture_output=True, text=True, timeout=230)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count(" 0 bytes spilled") >= 10, result.stdout


def test_slow_compilation_fails() -> None:
    result = compile_check("--arch", "90", "--only", "bfloat16 T=1 D=16", "--timeout", "0.001")
    assert result.returncode == 1
    assert "did not compile within 0.001 s" in result.stdout


@pytest.mark.parametrize(
    ("args", "interpret", "message"), [((), True, "TRITON_INTERPRET is set"), (("--only", "nothing"), False, "no case")]
)
def test_mistakes_are_named(args: tuple[str, ...], interpret: bool, message: str) -> None:
    result = compile_check(*args, interpret=interpret)
    assert result.returncode == 2
    assert message in result.stderr


def test_faults() -> None:
    case = all_cases("slot_attention")[0]
    clean = {"registers": 200, "spilled": 0, "local": 0, "shared": 170000, "tensor": {"HMMA": 40}, "seconds": 1.0}
    assert not Report(**clean).faults(case, 90)
    assert "exceeds sm_80's 166912" in Report(**clean).faults(case, 80)[0]
    assert "spills 16 bytes" in Report(**clean | {"spilled": 16}).faults(case, 90)[0]
    assert "spills" in Report(**clean | {"local": 2}).faults(case, 90)[0]
    assert "no tensor-core" in Report(**clean | {"tensor": {"HMMA": 0}}).faults(case, 90)[0]
    latest = dataclasses.replace(case, latest=True)
    assert not Report(**clean | {"shared": 0}).faults(latest, 80)
    assert "no HGMMA" in Report(**clean | {"tensor": {"HMMA": 40, "HGMMA": 0}}).faults(latest, 90)[0]
    precise = dataclasses.replace(case, constants={**case.constants, "PRECISION": "ieee"})
    assert "in TF32" in Report(**clean).faults(precise, 90)[0]
