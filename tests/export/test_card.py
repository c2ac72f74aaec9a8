"""The model card: what hubs read, what people read, and nothing of the machine."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from eclip.export.card import write_card
from eclip.export.run import Wanted, export_run
from tests.helpers import ROOT


def test_hubs_can_read_the_top(exported: Path) -> None:
    yaml = pytest.importorskip("yaml")
    top = yaml.safe_load((exported / "README.md").read_text(encoding="utf-8").split("---\n")[1])
    assert (top["library_name"], top["license"], "license_name" in top) == ("eclip", "apache-2.0", False)
    assert {"eclip", "onnx"} <= set(top["tags"])
    results = top["model-index"][0]["results"][0]
    assert results["dataset"]["split"] == "test" and results["task"]["type"] == "product-retrieval"
    assert all(0 <= metric["value"] <= 100 for metric in results["metrics"])


def test_it_tells_the_whole_evaluation(finished: Path, exported: Path) -> None:
    card = (exported / "README.md").read_text(encoding="utf-8")
    tables = json.loads((finished / "evaluation.json").read_text())["tables"]
    for table in tables.values():
        assert f"**{table['title']}**" in card
        for row in table["rows"]:
            assert f"| {row} |" in card
    share = tables["product_retrieval"]["rows"]["global (image)"]["mAP@1"]
    assert f"| global (image) | {100 * share:.1f} |" in card


def test_it_tells_data_training_and_files(finished: Path, exported: Path) -> None:
    card = (exported / "README.md").read_text(encoding="utf-8")
    prints = json.loads((finished / "data.json").read_text())["fingerprints"]
    for split, fingerprint in prints.items():
        assert f"| {split} | 9 | 36 | `{fingerprint}` |" in card
    for words in ("newest checkpoint, step 2 of 2", "| objective | eclip |", "onnx/decoder.onnx", "Weights: apache-2."):
        assert words in card
    assert "ViTModel.from_pretrained" in card and "eclip train --start-from" in card
    assert all(len(row) == 1 for row in _columns(card)), "a table's rows have as many cells as its head"


def _columns(card: str) -> list[set[int]]:
    return [{len(line.split(" | ")) for line in block.splitlines()} for block in card.split("\n\n") if block[:1] == "|"]


def test_no_path_of_the_machine_is_in_it(finished: Path, exported: Path, tmp_path: Path) -> None:
    data_dir = json.loads((finished / "data.json").read_text())["data_dir"]
    for path in (p for p in exported.rglob("*") if p.suffix in (".json", ".md")):
        text = path.read_text(encoding="utf-8")
        for place in (data_dir, str(finished.parent), str(exported.parent), str(Path.home()), str(ROOT)):
            assert place not in text, (path, place)
        assert not re.search(r"[\s\"'(`]/(tmp|home|root|mnt|data)/", text), path


def test_the_lines_of_its_python_run(exported: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (40, 30), "red").save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (exported / "README.md").read_text(encoding="utf-8"), flags=re.S)
    assert len(blocks) == 2
    for block in blocks:
        exec(block.replace("THIS FOLDER", str(exported)), {})


def test_less_is_told_of_less(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr("eclip.export.run.write_card", lambda card: seen.append(card) or write_card(card))
    export_run(finished, tmp_path / "out", Wanted(towers=False, name="shop | one", progress=False))
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "# shop | one" in text and "transformers" not in text and "ONNX" not in text
    assert 'license: "other"\nlicense_name: "not-stated"' in text and "did not state their licence" in text
    clip = dataclasses.replace(seen[0].facts, trains_decoder=False, objective="clip")
    text = write_card(dataclasses.replace(seen[0], facts=clip, evaluation=None, sizes={}))
    assert "without the instance decoder" in text and "prompts=" not in text and "model-index" not in text
    assert "| train | ? | ? |" in text
