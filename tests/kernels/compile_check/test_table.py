"""The README's table of machine code: what the program would write, and what stands there."""

from collections import Counter

import pytest

from eclip.kernels.compile_check.coverage import kernels
from eclip.kernels.compile_check.report import Report
from eclip.kernels.compile_check.sass import Code
from eclip.kernels.compile_check.table import BEGIN, COLUMNS, END, PAPER, README, SMALL, renewed, row


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def readme_rows() -> list[list[str]]:
    table = README.read_text().partition(BEGIN)[2].partition(END)[0].strip()
    return [cells(line) for line in table.splitlines()]


def test_a_row_has_the_columns() -> None:
    code = Code(
        loop=Counter({"instructions": 86, "HGMMA": 16, "BAR": 2}),
        rest=Counter({"instructions": 1500, "MUFU": 128, "HMMA": 3, "LDS+STS": 171}),
        in_flight=98304,
    )
    report = Report(registers=254, spilled=0, shared=196608, code=code, products=frozenset({"half"}), seconds=1.0)
    found = dict(zip(COLUMNS, cells(row("L_itc", "_contrastive_fwd_kernel", 90, report)), strict=True))
    assert found == {
        "of": "L_itc",
        "kernel": "`_contrastive_fwd_kernel`",
        "sm": "90",
        "registers": "254",
        "shared KiB": "192",
        "in flight KiB": "96",
        "instructions": "86 + 1500",
        "tensor cores": "HMMA 0 + 3, HGMMA 16 + 0",
        "MUFU": "0 + 128",
        "SHFL": "0 + 0",
        "LDS+STS": "0 + 171",
        "BAR": "2 + 0",
    }


def test_the_table_is_replaced_between_its_marks() -> None:
    text = f"before\n\n{BEGIN}\n\n| old |\n\n{END}\n\nafter\n"
    assert renewed(text, ["| new |", "| --- |"]) == f"before\n\n{BEGIN}\n\n| new |\n| --- |\n\n{END}\n\nafter\n"
    assert renewed(renewed(text, ["| new |"]), ["| new |"]) == renewed(text, ["| new |"])
    for broken in ("no marks", text.replace(END, ""), text.replace(BEGIN, "")):
        with pytest.raises(ValueError, match="no table to replace"):
            renewed(broken, [])


def test_the_readme_has_a_row_for_each_large_kernel_of_the_papers_sizes() -> None:
    """Numbers depend on the version of ptxas; names and columns do not."""
    header, rule, *found = readme_rows()
    assert header == list(COLUMNS) and set(rule) == {"---"}
    assert all(len(line) == len(COLUMNS) for line in found)
    assert {line[0] for line in found} <= set(PAPER)
    for arch in ("80", "90", "100"):
        named = {line[1].strip("`") for line in found if line[2] == arch}
        # The decoder's forward takes the other kernel.
        assert named == kernels() - set(SMALL) - {"slot_attention_fwd_kernel"}
