"""The table of machine code in kernels/README.md: the kernels of the paper's sizes, by what their speed depends on."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from .calls import Call
from .chips import TENSOR_CORE
from .compiler import compile_all
from .contrastive_calls import ContrastiveCall
from .report import Report
from .slot_attention_calls import SlotAttentionCall
from .stub import Launch, launches

README = Path(__file__).parents[1] / "README.md"
BEGIN = "<!-- machine code: made by `python -m eclip.kernels.compile_check --readme`; do not edit -->"
END = "<!-- machine code: end -->"

PAPER: dict[str, Call] = {
    "decoder": SlotAttentionCall(entropy=True),
    "decoder, six blocks": SlotAttentionCall(entropy=True, calls=6),
    "L_itc": ContrastiveCall(),
    "L_itc, logits kept": ContrastiveCall(kept=True),
    "L_itc with ids": ContrastiveCall(positives="all"),
    "L_itc with ids, kept": ContrastiveCall(positives="all", kept=True),
}
# Their work grows with the features, that of the others with the tokens or with the logits.
SMALL = (
    *("slot_attention_combine_kernel", "_contrastive_sums_kernel"),
    *("_contrastive_target_kernel", "_contrastive_finish_kernel"),
)
COLUMNS = (
    *("of", "kernel", "sm", "registers", "shared KiB", "in flight KiB", "instructions", "tensor cores"),
    *("MUFU", "SHFL", "LDS+STS", "BAR"),
)


def rows(archs: Sequence[int], timeout: float, jobs: int) -> list[str]:
    """The table, a line a kernel and architecture. Raises RuntimeError where one does not compile."""
    chosen = [(of, launch) for of, call in PAPER.items() for arch in archs for launch in launches([call], arch)]
    chosen = [(of, launch) for of, launch in chosen if launch.name not in SMALL and not _seldom(launch)]
    lines = [_line(COLUMNS), _line(["---"] * len(COLUMNS))]
    known: set[str] = set()
    for (of, _), (launch, outcome) in zip(chosen, compile_all([x for _, x in chosen], timeout, jobs), strict=True):
        if isinstance(outcome, str):
            raise RuntimeError(f"{launch.name} on sm_{launch.arch}: {outcome}")
        like_all = row("", launch.name, launch.arch, outcome)
        if like_all not in known:  # what two of them launch stands under the first
            lines.append(row(of, launch.name, launch.arch, outcome))
        known.add(like_all)
    return lines


def row(of: str, kernel: str, arch: int, report: Report) -> str:
    """A kernel's line of the table."""
    code = report.code

    def counted(column: str) -> str:
        return f"{code.loop[column]} + {code.rest[column]}"

    tensor = [f"{name} {counted(name)}" for name in TENSOR_CORE if code.total(name)]
    sizes = (str(report.registers), _kibibytes(report.shared), _kibibytes(code.in_flight))
    counts = [counted(name) for name in COLUMNS[-4:]]
    return _line([of, f"`{kernel}`", str(arch), *sizes, counted("instructions"), ", ".join(tensor) or "-", *counts])


def renewed(text: str, lines: Iterable[str]) -> str:
    """`text` with the table between its two marks replaced."""
    before, _, rest = text.partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise ValueError(f"no table to replace: {BEGIN} and {END} must stand in the text, each on a line")
    return "\n".join([f"{before}{BEGIN}\n", *lines, f"\n{END}{after}"])


def _seldom(launch: Launch) -> bool:
    """Whether it is the second pass of a loss, whose programs return at once unless sums underflow."""
    data = json.loads(launch.specialization)
    names = list(data["signature"])
    constants = {names[key[0]]: value for key, value in zip(data["constant_keys"], data["constant_vals"], strict=True)}
    return constants.get("ONLINE") is True


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _kibibytes(count: int) -> str:
    return f"{count / 1024:.0f}"
