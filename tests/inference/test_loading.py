"""`eclip.load`: a run's folder, what is none, and the import that costs nothing."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import eclip
from eclip.training.checkpoint import load_run
from tests.helpers import ROOT


def test_a_run_is_loaded_with_its_vocabulary(finished: Path) -> None:
    model = eclip.load(str(finished), "cpu")
    theirs, config, tokenizer = load_run(finished)
    ours = model.encoder.model
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert not ours.training and model.encoder.max_tokens == config.data.max_tokens
    assert model.encoder.tokenizer.encode(["red sofa"])[0].tolist() == tokenizer.encode(["red sofa"])[0].tolist()
    assert model.source == str(finished) and model.threshold == 0.5


@pytest.mark.parametrize(
    "record, threshold",
    [
        ({"tables": {"grounding": {"settings": {"thresholds": {"instance": 0.2}}}}}, 0.2),
        ({"tables": {}}, 0.5),
        (7, 0.5),
    ],
)
def test_the_threshold_is_the_evaluations(finished: Path, tmp_path: Path, record: object, threshold: float) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "evaluation.json").write_text(json.dumps(record))
    assert eclip.load(run).threshold == threshold


def test_what_is_no_model(tmp_path: Path, finished: Path) -> None:
    (tmp_path / "file").write_text("")
    for path, words in ((tmp_path / "gone", "no such folder"), (tmp_path / "file", "no such folder")):
        with pytest.raises(ValueError, match=words):
            eclip.load(path)
    with pytest.raises(ValueError):
        eclip.load(tmp_path)
    with pytest.raises(ValueError, match="--device"):
        eclip.load(finished, "tpu")


def test_importing_eclip_imports_no_torch() -> None:
    code = "import eclip, sys; assert eclip.load and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=ROOT)
