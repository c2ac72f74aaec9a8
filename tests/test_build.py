"""setup.py and constraints.txt against the tree: every folder is packaged, every dependency has a tested version."""

import importlib
import re
import runpy
import sys
import types
from typing import Any

import pytest

from tests.helpers import ROOT, our_files


@pytest.fixture
def metadata(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The arguments that setup.py passes to setuptools."""
    seen: dict[str, Any] = {}
    fake = types.ModuleType("setuptools")
    fake.setup = seen.update  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "setuptools", fake)
    runpy.run_path(str(ROOT / "setup.py"))
    return seen


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[<>=!~;\[ ]", line)[0].lower() for line in requirements}


def test_every_folder_with_code_is_a_package(metadata: dict[str, Any]) -> None:
    folders = {file.parent for file in our_files(".py")}
    expected = {f.parts for f in folders if f.parts[:1] == ("eclip",)}
    expected |= {("eclip", *f.parts) for f in folders if f.parts[:1] in (("kernels",), ("dataloading",))}
    assert set(metadata["packages"]) == {".".join(parts) for parts in expected}


def test_the_embedded_catalogue_is_packaged(metadata: dict[str, Any]) -> None:
    patterns = metadata["package_data"]["eclip.dataloading.demo"]
    files = [file for pattern in patterns for file in (ROOT / "dataloading/demo").glob(pattern)]
    assert any(f.suffix == ".tar" for f in files)
    assert any("LICENSE" in f.name for f in files)


def test_the_eclip_command_is_a_function_of_the_package(metadata: dict[str, Any]) -> None:
    (line,) = metadata["entry_points"]["console_scripts"]
    name, module, function = re.fullmatch(r"(\w+) = ([\w.]+):(\w+)", line).groups()
    assert name == "eclip"
    assert callable(getattr(importlib.import_module(module), function))


def test_every_dependency_has_a_tested_version(metadata: dict[str, Any]) -> None:
    wanted = names(
        metadata["install_requires"] + metadata["extras_require"]["dev"] + metadata["extras_require"]["towers"]
    )
    pinned = names([line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"])
    assert wanted <= pinned, f"without a version in constraints.txt: {sorted(wanted - pinned)}"


def test_version_is_the_package_s(metadata: dict[str, Any]) -> None:
    import eclip

    assert metadata["version"] == eclip.__version__
