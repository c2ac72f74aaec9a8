"""The floors of the house, checked on the source: kernels and dataloading are strangers, eclip stands on both.

Also: who may import which package, and that optional packages are imported where they are used, not at the top.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("kernels", "dataloading", "eclip", "benchmarks", "tests")
# What a floor may import of ours, by absolute name. Inside kernels and dataloading imports are relative.
ALLOWED: dict[str, tuple[str, ...]] = {
    "kernels": (),
    "dataloading": (),
    "eclip": ("eclip",),
    "benchmarks": ("eclip", "benchmarks"),
    "tests": ("eclip", "benchmarks", "tests"),
}
OURS = ("eclip", "kernels", "dataloading", "benchmarks", "tests", "setup")
# Third-party packages that every installation has (setup.py), floor by floor.
REQUIRED = {
    "kernels": {"torch", "triton"},
    "dataloading": {"numpy", "PIL", "tokenizers", "torch", "tqdm", "tyro"},
    "eclip": {
        *("matplotlib", "numpy", "PIL", "safetensors", "scipy", "sklearn"),
        *("tokenizers", "torch", "tqdm", "triton", "tyro"),
    },
}
# Files that are all about one optional package import it at their top, and are themselves imported late.
LATE = {"dali_pipeline": "nvidia"}
OPTIONAL = {"apex", "nvidia", "onnx", "tensorboard", "transformers", "wandb", "xformers"}


def sources(folder: str) -> list[Path]:
    """Python files of a top-level folder; the links eclip/kernels and eclip/dataloading are not followed."""
    links = [ROOT / "eclip/kernels", ROOT / "eclip/dataloading"]
    return [p for p in sorted((ROOT / folder).rglob("*.py")) if not any(p.is_relative_to(link) for link in links)]


def imports(path: Path) -> Iterator[tuple[str, int, bool]]:
    """(absolute name or dots + name, line, whether it runs when the module is imported) of every import in a file."""

    def walk(node: ast.AST, at_top: bool) -> Iterator[tuple[str, int, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, child.lineno, at_top) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                yield "." * child.level + (child.module or ""), child.lineno, at_top
            else:
                # A `try` at the top may import an optional package and go on without it; a function imports late.
                inner = at_top and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.Try)
                inner = inner and not (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test))
                yield from walk(child, inner)

    yield from walk(ast.parse(path.read_text(encoding="utf-8")), True)


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_respect_the_floors(folder: str) -> None:
    wrong = []
    for path in sources(folder):
        depth = len(path.relative_to(ROOT / folder).parts)  # 1 for a file directly in the folder
        for name, line, _ in imports(path):
            top = name.split(".")[0]
            dots = len(name) - len(name.lstrip("."))
            if dots > depth or (not dots and top in OURS and top not in ALLOWED[folder]):
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("folder", REQUIRED)
def test_top_level_imports_are_always_installed(folder: str) -> None:
    known = REQUIRED[folder] | set(sys.stdlib_module_names) | {"eclip"}
    wrong = []
    for path in sources(folder):
        for name, line, at_top in imports(path):
            top, last = name.split(".")[0], name.split(".")[-1]
            always = (name.startswith(".") or top in known) and last not in LATE
            late = (top in OPTIONAL or last in LATE) and (not at_top or LATE.get(path.stem) == top)
            if always or late:
                continue
            wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}" + (" at the top" if at_top else ""))
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("folder", ["kernels", "dataloading"])
def test_floor_folders_are_linked_into_the_package(folder: str) -> None:
    link = ROOT / "eclip" / folder
    assert link.is_symlink()
    assert str(link.readlink()) == f"../{folder}"
    # With an __init__.py the folder would be an importable top-level package; `kernels` is somebody else's name.
    assert not (ROOT / folder / "__init__.py").exists()


def test_scan_sees_what_it_forbids(tmp_path: Path) -> None:
    """The scanner itself: late, guarded, relative and top-level imports are told apart."""
    file = tmp_path / "x.py"
    file.write_text(
        "import a.b\n"
        "from ..c import d\n"
        "try:\n    import e\nexcept ImportError:\n    pass\n"
        "def f():\n    from g import h\n"
    )
    assert list(imports(file)) == [("a.b", 1, True), ("..c", 2, True), ("e", 4, False), ("g", 8, False)]
