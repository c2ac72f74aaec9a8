"""The README's lines in Python run as they stand; where the trained run's numbers stand, ours have their form."""

import doctest
import re
import shutil
from pathlib import Path

import pytest

from eclip.inference import TrainedModel
from tests.helpers import ROOT
from tests.training.run_folders import make_data, make_run

NUMBER = re.compile(r"-?\d+(\.\d+)?")


def examples() -> list[doctest.Example]:
    """Those of the section "In Python"."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.partition("## In Python\n")[2].partition("\n## ")[0]
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL))
    found = doctest.DocTestParser().get_examples(code)
    assert len(found) >= 8
    return found


def form(text: str) -> str:
    """What stays of an output without its numbers and without what the width of a number changes."""
    return re.sub(r"\s+", "", NUMBER.sub("#", text))


def test_the_lines_in_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    data = make_data(tmp_path_factory.mktemp("shards"))
    make_run(data, tmp_path / "runs" / "demo_towers", embed_dim=384, image_size=168, patch_size=14)
    shutil.copytree(ROOT / "examples" / "photos", tmp_path / "examples" / "photos")
    monkeypatch.chdir(tmp_path)
    said: list[str] = []
    names: dict[str, object] = {}
    for example in examples():
        monkeypatch.setattr("sys.displayhook", lambda value: None if value is None else said.append(repr(value)))
        exec(compile(example.source, "README.md", "single"), names)
        told = said.pop() if said else ""
        assert form(told) == form(example.want), example.source
        if example.source.startswith("model.embed"):
            assert told == example.want.strip(), example.source
    assert isinstance(names["model"], TrainedModel)
