"""Reads a kernel's machine code (SASS, as nvdisasm prints it): its main loop, and what is counted in it and outside.

A loop is a branch back to a label above it, with all between; an EXIT between says that it is a detour coming back. The
main loop is the one with the most tensor-core instructions of its own, those of loops within it not counted, and of
several the innermost: not the loop over tiles around the one over channels, and not the few instructions that spin on a
barrier. Numbers are those of one warp and one turn of each loop; all that is outside is added up, other loops too.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from .chips import TENSOR_CORE

_LINE = re.compile(r"^\s*(?:(\.L_\w+):|/\*[0-9a-f]{4,}\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)(.*?);)", re.MULTILINE)
_TARGET = re.compile(r"`\((\.L_\w+)\)")
_GROUPS = re.compile(r"SB0,\s*0x([0-9a-f]+)")

# What the columns of the table add up: instructions by their first word.
COLUMNS = {
    **{name: (name,) for name in TENSOR_CORE},
    "MUFU": ("MUFU",),  # exp2, log2, reciprocals: 16 a clock and multiprocessor
    "SHFL": ("SHFL",),  # exchange within a warp
    "LDS+STS": ("LDS", "LDSM", "STS", "STSM"),  # shared memory
    "BAR": ("BAR",),  # waits for all warps
    "local": ("LDL", "STL"),
}


@dataclass(frozen=True)
class Instruction:
    """One of a kernel, in order."""

    opcode: str
    """With its modifiers: "LDGSTS.E.BYPASS.128"."""
    operands: str
    guard: str
    """"@P0", "@!UP1"; empty: always."""

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]


@dataclass(frozen=True)
class Code:
    """What is counted: of the main loop, and of all the rest."""

    loop: Counter[str]
    rest: Counter[str]
    in_flight: int
    """Bytes that a block's asynchronous copies (cp.async) have under way when the main loop waits for the next."""

    def total(self, column: str) -> int:
        return self.loop[column] + self.rest[column]


def read(text: str, warps: int) -> Code:
    """text: of one kernel; warps: of a block."""
    instructions, labels = _parse(text)
    first, last = _main_loop(instructions, labels)
    loop = instructions[first:last]
    return Code(
        loop=_count(loop),
        rest=_count(instructions[:first] + instructions[last:]),
        in_flight=_in_flight(loop, warps),
    )


def _parse(text: str) -> tuple[list[Instruction], dict[str, int]]:
    """The instructions that can run, and at which of them a label stands."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for label, guard, opcode, operands in _LINE.findall(text):
        if label:
            labels[label] = len(instructions)
        elif guard != "@!PT":
            instructions.append(Instruction(opcode, operands.strip(), guard))
    return instructions, labels


def _main_loop(instructions: Sequence[Instruction], labels: dict[str, int]) -> tuple[int, int]:
    """First and one past the last instruction; (0, 0) of a kernel without a loop."""
    loops = []
    for i, instruction in enumerate(instructions):
        target = _TARGET.search(instruction.operands) if instruction.name == "BRA" else None
        first = labels.get(target[1], i) if target else i
        if first < i and not any(x.name == "EXIT" and not x.guard for x in instructions[first:i]):
            loops.append((first, i + 1))
    if not loops:
        return 0, 0

    def rank(loop: tuple[int, int]) -> tuple[int, int, int]:
        first, last = loop
        within = [other for other in loops if other != loop and first <= other[0] and other[1] <= last]
        around = [other for other in loops if other != loop and other[0] <= first and last <= other[1]]
        inner = {i for start, end in within for i in range(start, end)}
        own = [instructions[i].name for i in range(first, last) if i not in inner]
        products = sum(name in TENSOR_CORE for name in own)
        return products, len(around) if products else 0, len(own)

    return max(loops, key=rank)


def _count(instructions: Sequence[Instruction]) -> Counter[str]:
    names = Counter(instruction.name for instruction in instructions)
    counts = Counter({column: sum(names[name] for name in words) for column, words in COLUMNS.items()})
    counts["instructions"] = len(instructions)
    return counts


def _in_flight(loop: Sequence[Instruction], warps: int) -> int:
    """Copies of a turn, times the turns whose copies may be open at the loop's wait: one more than it leaves open."""
    width = {"128": 16, "64": 8}
    copied = sum(width.get(x.opcode.rpartition(".")[2], 4) for x in loop if x.name == "LDGSTS")
    groups = sum(x.name == "LDGDEPBAR" for x in loop)
    waits = (_GROUPS.match(x.operands) for x in loop if x.opcode == "DEPBAR.LE")
    left_open = [int(found[1], 16) for found in waits if found]
    if not (copied and groups and left_open):
        return 0
    return copied * 32 * warps * (max(left_open) // groups + 1)
