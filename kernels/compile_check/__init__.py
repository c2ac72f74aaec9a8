"""Compile every kernel configuration ahead of time, without a GPU, and fail on what would make it slow or not launch.

    python -m eclip.kernels.compile_check [--arch 80 90 100] [--only slot_attention] [--timeout 60]

Prints, per configuration and architecture: registers a thread, bytes spilled, shared memory, tensor-core instructions
(HMMA on sm_80, HMMA or HGMMA on sm_90, HMMA or UTCHMMA on sm_100) and seconds. Exits with 1 if anything spills, touches
local memory, exceeds the chip's shared memory, lacks the tensor-core instructions its case promises or uses them where
it promises full precision, does not compile, or takes longer than the timeout (a kernel that spills badly compiles for
4-17 s).

The files of this folder that launch kernels define `compile_cases() -> Iterator[Case]`, and are found by that; a file
whose kernels are in no case is an error. The check needs a process of its own, started without TRITON_INTERPRET: Triton
decides between the two at decoration.
"""

import argparse
import contextlib
import importlib
import io
import multiprocessing
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

SHARED_MEMORY = {80: 166912, 90: 232448, 100: 232448, 120: 101376}  # bytes a block may opt in to
TENSOR_CORE = ("HMMA", "HGMMA", "UTCHMMA")
LATEST = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One configuration of one kernel, as its launcher would launch it."""

    name: str
    kernel: Any
    """A function decorated with @triton.jit."""
    types: Mapping[str, str | tuple[str, ...]]
    """Triton type of every runtime argument: "*bf16", "*fp32", "*u8", "i32", "fp32"...; a tuple argument's types."""
    constants: Mapping[str, Any]
    """Value of every constexpr, and None for pointers that are left out."""
    divisible: tuple[str, ...] = ()
    """Arguments that are multiples of 16 (aligned pointers, strides): Triton vectorises loads by them."""
    options: Mapping[str, int] = field(default_factory=dict)
    """num_warps, num_stages."""
    generation: int | None = None
    """Major compute capability that the case is for (8 for sm_80...); None: all."""
    tensor_core: bool = True
    """Whether the kernel must use the tensor cores (an fp32 kernel at full precision cannot)."""
    latest: bool = False
    """Whether it must use the instructions that reach their full rate: HGMMA on sm_90, UTCHMMA on sm_100."""


def pointer_to(dtype: torch.dtype) -> str:
    """Triton's name of a pointer to `dtype`."""
    return {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}[dtype]


@dataclass(frozen=True)
class Report:
    """What the compiler made of a case."""

    registers: int
    spilled: int
    local: int
    shared: int
    tensor: Mapping[str, int]
    seconds: float

    def faults(self, case: Case, arch: int) -> list[str]:
        """Why the case fails; empty if it does not."""
        found = []
        if self.spilled or self.local:
            found.append(f"spills {self.spilled} bytes ({self.local} local-memory instructions)")
        if self.shared > SHARED_MEMORY[arch]:
            found.append(f"shared memory {self.shared} exceeds sm_{arch}'s {SHARED_MEMORY[arch]}")
        if case.tensor_core and not sum(self.tensor.values()):
            found.append("no tensor-core instruction")
        if case.latest and not self.tensor[LATEST[arch]]:
            found.append(f"no {LATEST[arch]}")
        if case.constants.get("PRECISION") == "ieee" and sum(self.tensor.values()):
            found.append("products at full precision run on the tensor cores, in TF32")
        return found


def compile_case(case: Case, arch: int) -> Report:
    """Compile for `arch` and read registers and spills from ptxas, instructions from the disassembly."""
    names = case.kernel.arg_names
    signature = {name: case.types.get(name, "constexpr") for name in names}
    unknown = [n for n in names if signature[n] == "constexpr" and n not in case.constants]
    assert not unknown, f"{case.name}: neither type nor constant given for {unknown}"
    attributes = {path: [["tt.divisibility", 16]] for name in case.divisible for path in _paths(case, name)}
    constants = {name: case.constants[name] for name in names if signature[name] == "constexpr"}
    log = io.StringIO()
    start = time.perf_counter()
    with contextlib.redirect_stdout(log), knobs.compilation.scope(), knobs.nvidia.scope():
        knobs.compilation.always_compile = True  # a cached kernel has no ptxas log
        knobs.nvidia.dump_ptxas_log = True
        source = ASTSource(case.kernel, signature, constants, attributes)
        compiled = compile(source, target=GPUTarget("cuda", arch, 32), options=dict(case.options))
    seconds = time.perf_counter() - start
    registers = re.search(r"Used (\d+) registers", log.getvalue())
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log.getvalue())
    assert registers and spills, f"{case.name}: no ptxas log"
    code = _disassemble(compiled.asm["cubin"])
    return Report(
        registers=int(registers[1]),
        spilled=int(spills[1]) + int(spills[2]),
        local=len(re.findall(r"\b(?:STL|LDL)\b", code)),
        shared=compiled.metadata.shared,
        tensor={name: len(re.findall(rf"\b{name}\b", code)) for name in TENSOR_CORE},
        seconds=seconds,
    )


def _paths(case: Case, name: str) -> list[tuple[int, ...]]:
    """Where an argument sits: its position, or one (position, i) per member of a tuple."""
    position, kind = case.kernel.arg_names.index(name), case.types[name]
    return [(position, i) for i in range(len(kind))] if isinstance(kind, tuple) else [(position,)]


def _disassemble(cubin: bytes) -> str:
    tool = os.path.join(os.path.dirname(knobs.nvidia.ptxas.path), "nvdisasm")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, file.name], capture_output=True, text=True, check=True).stdout


def _child(case: Case, arch: int, result: Connection) -> None:
    try:
        result.send(compile_case(case, arch))
    except Exception as error:  # whatever the compiler raises is the finding
        result.send(f"{type(error).__name__}: {str(error).strip()[-300:]}")


def compile_within(case: Case, arch: int, timeout: float) -> Report | str:
    """`compile_case` in a forked process that is ended after `timeout` seconds; the failure as text."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(case, arch, sender))
    process.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(timeout) else f"did not compile within {timeout:g} s"
    except EOFError:
        return "the compiler crashed"
    finally:
        process.kill()
        process.join()


def all_cases(only: str = "") -> list[Case]:
    """The cases of this folder whose name contains `only`."""
    own = Path(__file__).parent
    cases: list[Case] = []
    with_kernels = set()
    for file in sorted(own.parent.rglob("*.py")):
        path = file.relative_to(own.parent).with_suffix("")
        name, text = ".".join((__package__.rpartition(".")[0], *path.parts)), file.read_text()
        if own in file.parents:
            continue
        if "def compile_cases(" in text:
            cases += importlib.import_module(name).compile_cases()
        if re.search(r"@triton\.jit\ndef \w+_kernel\(", text):  # other functions are parts of kernels
            with_kernels.add(name)
    unchecked = with_kernels - {case.kernel.fn.__module__ for case in cases}
    assert not unchecked, f"no compile case for a kernel of {', '.join(sorted(unchecked))}"
    return [case for case in cases if only in case.name]


def main(argv: list[str] | None = None) -> int:
    """Print the table; return the number of failed rows (the process exits with 1 if there are any)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100], choices=sorted(SHARED_MEMORY))
    parser.add_argument("--only", default="", help="compile the cases whose name contains this")
    parser.add_argument("--timeout", type=float, default=60, help="seconds a case may take")
    args = parser.parse_args(argv)
    if knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: kernels would be interpreted; start this process without it")
    print(f"{'case':58} {'sm':>4} {'regs':>5} {'spill':>6} {'shared':>7} {'HMMA':>5} {'HGMMA':>5} {'UTC':>5} {'s':>5}")
    failed = compiled = 0
    for case in all_cases(args.only):
        for arch in args.arch:
            if case.generation not in (None, arch // 10):
                continue
            report = compile_within(case, arch, args.timeout)
            compiled += 1
            if isinstance(report, str):
                faults, columns = [report], ""
            else:
                faults = report.faults(case, arch)
                tensor = " ".join(f"{report.tensor[name]:5}" for name in TENSOR_CORE)
                columns = f"{report.registers:5} {report.spilled:6} {report.shared:7} {tensor} {report.seconds:5.1f}"
            failed += bool(faults)
            print(f"{case.name:58} {arch:4} {columns}{'  FAIL: ' if faults else ''}{'; '.join(faults)}", flush=True)
    print(f"{compiled} configurations, {failed} failed")
    if not compiled:
        parser.error(f"no case matches --only {args.only!r}")
    return failed

