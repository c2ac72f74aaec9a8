"""A run's export: what it loads as, what is said, what is refused before anything is written."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

import eclip
from eclip.evaluate.run import evaluate_run
from eclip.export import run as run_module
from eclip.export.run import Wanted, export_run
from eclip.files import PARTIAL
from tests.helpers import file_size_limit
from tests.training.run_folders import contents, copy_run, make_data

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
QUICK = Wanted(towers=False, progress=False)


def test_the_export_is_the_run_to_the_bit(finished: Path, exported: Path) -> None:
    run, model = eclip.load(finished, "cpu"), eclip.load(exported, "cpu")
    assert model.encoder.fingerprint == run.encoder.fingerprint
    assert (model.threshold, model.encoder.max_tokens) == (run.threshold, run.encoder.max_tokens)
    picture = np.zeros((20, 30, 3), np.uint8)
    for ask in ("embed_texts", "embed_images"):
        given = "a red chair" if ask == "embed_texts" else picture
        assert np.array_equal(getattr(run, ask)(given), getattr(model, ask)(given))
    assert sorted(path.name for path in exported.iterdir()) == [
        "README.md", "config.json", "model.safetensors", "onnx", "tokenizer.json", "towers",
    ]  # fmt: skip


def test_what_was_written_is_said(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export_run(finished, tmp_path / "out", Wanted(onnx=True, progress=False))
    said = capsys.readouterr().out
    assert re.search(rf"written: {tmp_path / 'out'}\n +\d\.\d MB  model.safetensors: [\d,]+ parameters, float32", said)
    assert "towers: ViTModel and BertModel of transformers" in said
    for name in ("image", "text", "decoder"):
        assert re.search(rf"MB  onnx/{name}.onnx: differs from PyTorch by \d\.\de-\d\d at most", said)
    assert "the card states no licence" in said


def test_int8_is_measured_on_the_runs_test_split(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export_run(finished, tmp_path / "out", Wanted(towers=False, int8=True, progress=False))
    said = capsys.readouterr().out
    line = r"  global \(image\) +mAP@1 \d+\.\d -> \d+\.\d \([+-]\d+\.\d\)   mAP@10 \d"
    assert re.search(r"int8 weights, test split, the same product \(\d+ queries, \d+ gallery\)", said)
    assert re.search(line, said) and "chance" not in said
    assert "**int8 weights against float32**" in (tmp_path / "out" / "README.md").read_text()
    assert eclip.load(tmp_path / "out", "cpu").embed_texts("a chair").shape[0] == 1


def test_without_the_catalogue_int8_says_so(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy_run(finished, tmp_path / "run")
    (run / "data.json").unlink()
    text = (run / "config.json").read_text()
    (run / "config.json").write_text(re.sub(r'"data_dir": "[^"]*"', '"data_dir": "/gone"', text))
    export_run(run, tmp_path / "out", Wanted(towers=False, int8=True, progress=False))
    assert "what int8 costs is not measured: /gone: no such folder" in capsys.readouterr().out
    card = (tmp_path / "out" / "README.md").read_text()
    assert "what int8 costs was not measured" in card and "/gone" not in card
    with pytest.raises(ValueError, match="elsewhere: no such folder"):
        export_run(run, tmp_path / "two", Wanted(int8=True, data_dir=tmp_path / "elsewhere", progress=False))
    assert not (tmp_path / "two").exists()
    monkeypatch.setattr(run_module, "measure_loss", lambda *_, **__: pytest.fail("--no-measure measures nothing"))
    export_run(run, tmp_path / "three", Wanted(towers=False, int8=True, measure=False))


def test_the_moving_average_is_another_model(finished: Path, exported: Path, tmp_path: Path) -> None:
    export_run(finished, tmp_path / "out", Wanted(weights="momentum", towers=False, progress=False))
    averaged, trained = eclip.load(tmp_path / "out", "cpu"), eclip.load(exported, "cpu")
    assert averaged.encoder.fingerprint == eclip.load(finished, "cpu", weights="momentum").encoder.fingerprint
    assert averaged.encoder.fingerprint != trained.encoder.fingerprint
    assert "The run was not evaluated." in (tmp_path / "out" / "README.md").read_text()


def test_an_evaluation_that_cannot_be_read_is_none(finished: Path, tmp_path: Path) -> None:
    run = copy_run(finished, tmp_path / "run")
    untold = '{"split": 1, "products": 1, "images": 1, "tables": []}'
    for number, text in enumerate(("{", "[]", '{"split": 1}', untold)):
        (run / "evaluation.json").write_text(text)
        export_run(run, tmp_path / f"out{number}", QUICK)
        assert "The run was not evaluated." in (tmp_path / f"out{number}" / "README.md").read_text()


def test_what_cannot_be_exported_is_one_line(finished: Path, exported: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for run, wanted, words in (
        (tmp_path / "gone", QUICK, "gone: no such folder; give the --run-dir"),
        (exported, QUICK, "an exported model already"),
        (make_data(tmp_path / "data"), QUICK, r"no run here \(config.json is missing\)"),
        (finished, Wanted(which="best"), "no checkpoint has a loss of the val split"),
        (finished, Wanted(licence="my own"), "--licence my own: give its SPDX name"),
        (finished, Wanted(int8=True, limit=0), "--limit 0"),
        (finished, Wanted(int8=True, device="tpu"), "--device tpu: no such device"),
    ):
        with pytest.raises(ValueError, match=words) as refusal:
            export_run(run, out, wanted)
        assert "\n" not in str(refusal.value)
    assert not out.exists() and not out.with_name(f"out{PARTIAL}").exists()


def test_what_needs_a_run_says_that_this_is_none(exported: Path) -> None:
    with pytest.raises(ValueError, match="an exported model, not a run; eclip.load and --start-from open it"):
        evaluate_run(exported, progress=False)


def test_a_full_disk_leaves_what_was_there(finished: Path, exported: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(exported, tmp_path / "out"))
    before = contents(out)
    for limit in (1000, 30_000):  # in the tokenizer, in the weights
        with file_size_limit(limit), pytest.raises(ValueError, match=r"out: cannot be written .*choose another --out"):
            export_run(finished, out, Wanted(overwrite=True, progress=False))
        assert contents(out) == before
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
