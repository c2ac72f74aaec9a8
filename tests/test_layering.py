"""The floors of the house, checked on the source: kernels and dataloading are strangers, eclip stands on both.

Inside each of them rooms and files stand on floors of their own; a late import, inside a function, counts like any
other. Also: who may import which package, and that optional packages are imported where they are used, not at the top.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import FOLDERS, ROOT, files_below

# What a floor may import of ours, by absolute name. Inside kernels and dataloading imports are relative.
ALLOWED: dict[str, tuple[str, ...]] = {
    "kernels": (),
    "dataloading": (),
    "eclip": ("eclip",),
    "benchmarks": ("eclip", "benchmarks"),
    "tests": ("eclip", "benchmarks", "tests"),
}
# Bottom up: what stands on a floor imports from lower ones, and not what stands beside it.
FLOORS: dict[str, tuple[tuple[str, ...], ...]] = {
    "kernels": (("launch",), ("slot_attention", "contrastive"), ("compile_check",)),
    "dataloading": (
        ("errors", "file_kinds", "schema", "schedule"),
        ("parts", "system", "images", "tables", "tars", "text"),
        ("packing",),
        ("shards",),
        ("sampling",),
        ("pipeline",),
        ("needs", "torch_pipeline", "dali_pipeline"),
        ("loader",),
        ("pack", "demo"),
    ),
    "eclip": (
        ("kernels", "dataloading"),
        ("setting_rules", "files"),
        ("model", "parallel"),
        ("objectives", "weights"),
        ("config",),  # composes the settings of model and objectives
        ("presets",),
        ("training",),
        ("evaluate",),
        ("inference",),
        ("export",),
        ("search",),
        ("serve",),
        ("train",),
        ("cli",),
        ("__main__",),
    ),
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
OPTIONAL = {
    *("apex", "fastapi", "lancedb", "nvidia", "onnx", "onnxruntime", "pyarrow", "pydantic", "python_multipart"),
    *("starlette", "tensorboard", "transformers", "uvicorn", "wandb", "xformers"),
}


def imports(path: Path) -> Iterator[tuple[str, int, bool]]:
    """(absolute name or dots + name, line, whether it runs when the module is imported) of every import in a file."""

    def walk(node: ast.AST, at_top: bool) -> Iterator[tuple[str, int, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, child.lineno, at_top) for alias in child.names)
            elif isinstance(child, ast.ImportFrom) and child.module not in (None, "eclip"):
                yield "." * child.level + (child.module or ""), child.lineno, at_top
            elif isinstance(child, ast.ImportFrom):  # what comes from a package itself may be a module of it
                start = f"{child.module}." if child.module else "." * child.level
                yield from ((f"{start}{alias.name}", child.lineno, at_top) for alias in child.names)
            else:
                # A `try` at the top may import an optional package and go on without it; a function imports late.
                inner = at_top and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.Try)
                inner = inner and not (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test))
                yield from walk(child, inner)

    yield from walk(ast.parse(path.read_text(encoding="utf-8")), True)


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_respect_the_floors(folder: str) -> None:
    wrong = []
    for path in files_below(folder, "*.py"):
        depth = len(path.relative_to(ROOT / folder).parts)  # 1 for a file directly in the folder
        for name, line, _ in imports(path):
            top = name.split(".")[0]
            dots = len(name) - len(name.lstrip("."))
            if dots > depth or (not dots and top in OURS and top not in ALLOWED[folder]):
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


def tenant(path: Path, name: str, folder: str) -> str | None:
    """The room or file directly in the top-level folder that `path` in it imports from by `name`; None for others."""
    dots = len(name) - len(name.lstrip("."))
    if dots:
        place = path.relative_to(ROOT / folder).parts
        out = dots > len(place)  # of the folder: another test's matter
        return None if out else (*place[: len(place) - dots], *name[dots:].split("."))[0]
    top, *below = name.split(".")
    if top != "eclip":
        return None
    if folder == "eclip":
        return below[0] if below and below[0] != "__version__" else None
    return below[1] if below[:1] == [folder] and len(below) > 1 else None


@pytest.mark.parametrize("folder", FLOORS)
def test_rooms_import_from_lower_floors_alone(folder: str) -> None:
    floor_of = {name: floor for floor, names in enumerate(FLOORS[folder]) for name in names}
    wrong = []
    for path in files_below(folder, "*.py"):
        mine = path.relative_to(ROOT / folder).parts[0].removesuffix(".py")
        if mine == "__init__":
            continue
        if mine not in floor_of:
            wrong.append(f"{path.relative_to(ROOT)}: {mine} stands on no floor; give it one in FLOORS")
            continue
        for name, line, _ in imports(path):
            theirs = tenant(path, name, folder)
            if theirs in (None, mine):
                continue
            if theirs not in floor_of:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}, which stands on no floor")
            elif floor_of[theirs] >= floor_of[mine]:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}: {theirs} is not below {mine}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("folder", FLOORS)
def test_floors_name_what_is_there(folder: str) -> None:
    named = [name for names in FLOORS[folder] for name in names]
    assert len(set(named)) == len(named)
    gone = [n for n in named if not (ROOT / folder / n).is_dir() and not (ROOT / folder / f"{n}.py").is_file()]
    assert not gone


@pytest.mark.parametrize("folder", REQUIRED)
def test_top_level_imports_are_always_installed(folder: str) -> None:
    known = REQUIRED[folder] | set(sys.stdlib_module_names) | {"eclip"}
    wrong = []
    for path in files_below(folder, "*.py"):
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
        "from . import i, j\n"
        "from eclip import k\n"
    )
    assert list(imports(file)) == [
        *(("a.b", 1, True), ("..c", 2, True), ("e", 4, False), ("g", 8, False)),
        *((".i", 9, True), (".j", 9, True), ("eclip.k", 10, True)),
    ]


@pytest.mark.parametrize(
    "file, name, room",
    [
        ("eclip/training/feature_cache/cache.py", "eclip.model.eclip", "model"),
        ("eclip/train.py", ".training.step", "training"),
        ("eclip/train.py", "eclip", None),
        ("eclip/train.py", "torch.nn", None),
        ("kernels/contrastive/loss.py", ".problem", "contrastive"),
        ("kernels/contrastive/loss.py", "..launch", "launch"),
        ("kernels/compile_check/calls.py", "eclip.kernels.contrastive", "contrastive"),
        ("dataloading/tables/table.py", "..errors", "errors"),
        ("dataloading/demo/pack.py", "...evaluate", None),
    ],
)
def test_an_import_is_of_a_room(file: str, name: str, room: str | None) -> None:
    assert tenant(ROOT / file, name, file.split("/")[0]) == room
