"""Compiles launches, several at once, each in a forked process that is ended when it takes too long."""

import contextlib
import io
import multiprocessing
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from triton import knobs

from . import sass
from .report import Report, products
from .stub import Launch, as_if_on

Outcome = Report | str
"""The failure as text."""


def compile_launch(launch: Launch) -> Report:
    """Registers and spills from ptxas, instructions from the disassembly."""
    log = io.StringIO()
    start = time.perf_counter()
    with contextlib.redirect_stdout(log), knobs.compilation.scope(), knobs.nvidia.scope(), as_if_on(launch.arch):
        knobs.compilation.always_compile = True  # a cached kernel has no ptxas log
        knobs.nvidia.dump_ptxas_log = True
        compiled = launch.kernel.preload(launch.specialization)
    seconds = time.perf_counter() - start
    registers = re.search(r"Used (\d+) registers", log.getvalue())
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log.getvalue())
    assert registers and spills, f"{launch.name}: no ptxas log"
    return Report(
        registers=int(registers[1]),
        spilled=int(spills[1]) + int(spills[2]),
        shared=compiled.metadata.shared,
        code=sass.read(_disassemble(compiled.asm["cubin"]), compiled.metadata.num_warps),
        products=products(compiled.asm["ttir"]),
        seconds=seconds,
        serialised="wgmma.mma_async instructions are serialized" in log.getvalue(),
    )


def _disassemble(cubin: bytes) -> str:
    tool = os.path.join(os.path.dirname(knobs.nvidia.ptxas.path), "nvdisasm")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout


@dataclass(frozen=True)
class _Running:
    place: int
    process: BaseProcess
    deadline: float


def compile_all(launches: Sequence[Launch], timeout: float, jobs: int) -> Iterator[tuple[Launch, Outcome]]:
    """In the order given, `jobs` at a time; timeout: seconds for each."""
    outcomes: dict[int, Outcome] = {}
    running: dict[Connection, _Running] = {}
    started = reported = 0
    try:
        while reported < len(launches):
            while len(running) < jobs and started < len(launches):
                receiver, process = _start(launches[started])
                running[receiver] = _Running(started, process, time.monotonic() + timeout)
                started += 1
            first_end = min(task.deadline for task in running.values()) - time.monotonic()
            ready = wait(list(running), max(0.0, first_end))
            for receiver, task in list(running.items()):
                if receiver in ready:
                    outcomes[task.place] = _received(receiver)
                elif task.deadline <= time.monotonic():
                    outcomes[task.place] = f"did not compile within {timeout:g} s"
                else:
                    continue
                _end(running.pop(receiver).process)
            while reported in outcomes:
                yield launches[reported], outcomes.pop(reported)
                reported += 1
    finally:
        for task in running.values():
            _end(task.process)


def _start(launch: Launch) -> tuple[Connection, BaseProcess]:
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(launch, sender))
    process.start()
    sender.close()
    return receiver, process


def _child(launch: Launch, result: Connection) -> None:
    try:
        result.send(compile_launch(launch))
    except Exception as error:  # whatever the compiler raises is the finding
        result.send(f"{type(error).__name__}: {str(error).strip()[-300:]}")


def _received(receiver: Connection) -> Outcome:
    try:
        outcome: Outcome = receiver.recv()
        return outcome
    except EOFError:
        return "the compiler crashed"


def _end(process: BaseProcess) -> None:
    process.kill()
    process.join()
