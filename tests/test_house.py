"""What the house looks like: short files, small folders, a door to every room, tests that mirror the source."""

import ast
import re
from collections import Counter
from pathlib import PurePosixPath

import pytest

from tests.helpers import ROOT, our_files

LONGEST = 350
"""Lines of a file: what one reads in one go."""
MOST, MOST_TESTS = 13, 16
"""Python files of a folder beside its __init__; a room's tests are as many, and what they share."""
TEXT = (".py", ".md", ".sh", ".toml", ".txt")
PACKAGES = ("kernels", "dataloading", "eclip")
# The first two hold no __init__: they would be importable as top-level packages (see test_layering).
WITHOUT_DOOR = {PurePosixPath("kernels"), PurePosixPath("dataloading")}


def test_no_file_is_long() -> None:
    lines = {str(f): len((ROOT / f).read_text(encoding="utf-8").splitlines()) for f in our_files(*TEXT)}
    long = {name: count for name, count in lines.items() if count > LONGEST}
    assert not long, f"more than {LONGEST} lines; split by what is told: {long}"


def test_no_folder_is_full() -> None:
    count = Counter(file.parent for file in our_files(".py") if file.name != "__init__.py")
    full = {str(f): n for f, n in count.items() if n > (MOST_TESTS if f.parts[:1] == ("tests",) else MOST)}
    assert not full, f"make a room of what belongs together: {full}"


def test_every_room_has_a_door() -> None:
    rooms = {file.parent for file in our_files(".py") if file.parts[0] in PACKAGES} - WITHOUT_DOOR
    without = [str(room) for room in sorted(rooms) if not (ROOT / room / "__init__.py").is_file()]
    assert not without, f"without an __init__.py: {without}"


@pytest.mark.parametrize("folder", [*PACKAGES, "benchmarks", "tests"])
def test_every_file_says_what_it_is(folder: str) -> None:
    files = [f for f in our_files(".py") if f.parts[0] == folder and f != PurePosixPath("tests/__init__.py")]
    assert files
    silent = [str(f) for f in files if not ast.get_docstring(ast.parse((ROOT / f).read_text(encoding="utf-8")))]
    assert not silent, f"without a docstring: {silent}"


def test_tests_mirror_the_source() -> None:
    """The tests of a room lie in the folder of its name: tests/model for eclip/model, tests/kernels/x for kernels/x."""
    tests = [file for file in our_files(".py") if file.parts[0] == "tests" and file.name.startswith("test_")]
    rooms = {file.parent.relative_to("tests") for file in tests}
    strangers = [str(r) for r in sorted(rooms) if not (ROOT / r).is_dir() and not (ROOT / "eclip" / r).is_dir()]
    assert not strangers, f"tests of no room: {strangers}"


def test_a_rooms_map_names_what_is_there() -> None:
    files, gone = [f"/{file}" for file in our_files(".py")], []
    for door in our_files("/__init__.py"):
        told = ast.get_docstring(ast.parse((ROOT / door).read_text(encoding="utf-8"))) or ""
        for name in re.findall(r"[a-z0-9_/]+\.py\b", told):
            if not any(file.endswith(f"/{name.lstrip('/')}") for file in files):
                gone.append(f"{door} names {name}")
    assert not gone, "\n".join(gone)


def test_links_of_documents_lead_somewhere() -> None:
    broken = []
    for document in our_files(".md"):
        for target in re.findall(r"\]\(([^)#\s]+)", (ROOT / document).read_text(encoding="utf-8")):
            if "://" not in target and not (ROOT / document.parent / target.replace("\\", "")).exists():
                broken.append(f"{document} -> {target}")
    assert not broken, "\n".join(broken)
