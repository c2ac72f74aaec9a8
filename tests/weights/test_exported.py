"""A whole model as a folder: written and read, int8, and every way in which such a folder can be wrong."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import eclip
from eclip.dataloading.text import Tokenizer
from eclip.files import sha256
from eclip.inference import load
from eclip.model.eclip import ECLIP
from eclip.weights.exported import Facts, dequantised, is_exported, quantised, read_exported, write_exported
from tests.helpers import run_command
from tests.model.tiny import tiny

WORDS = ["a red chair", "the blue sofa", "green armchairs with wooden legs", "tables, lamps and rugs"]


@pytest.fixture(scope="module")
def model() -> ECLIP:
    torch.manual_seed(0)
    return ECLIP(tiny(vocab_size=128)).eval()


@pytest.fixture(scope="module")
def facts(model: ECLIP) -> Facts:
    return Facts(model=model.config, max_tokens=12, objective="eclip", trains_decoder=True, threshold=0.25)


@pytest.fixture(scope="module")
def whole(model: ECLIP, facts: Facts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    write_exported(folder, model, Tokenizer.train(WORDS, 128), facts)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def edit(folder: Path, **changes: Any) -> None:
    """config.json with other values; None takes one out."""
    record = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in record.items() if v is not None}))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Other weights, with the digest of the new file."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    files = json.loads((folder / "config.json").read_text())["files"]
    path = folder / "model.safetensors"
    edit(folder, files={**files, path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)}})


def test_what_is_written_is_read_to_the_bit(model: ECLIP, facts: Facts, whole: Path) -> None:
    read, found, tokenizer = read_exported(whole)
    assert found == facts and not read.training
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), read.state_dict().values(), strict=True))
    assert tokenizer.encode(WORDS, 9)[0].tolist() == Tokenizer.train(WORDS, 128).encode(WORDS, 9)[0].tolist()
    record = json.loads((whole / "config.json").read_text())
    assert (record["format"], record["version"], record["library"]) == ("eclip-model", 1, f"eclip {eclip.__version__}")


def test_load_takes_what_the_folder_says(whole: Path) -> None:
    trained = load(whole, "cpu")
    assert (trained.threshold, trained.encoder.max_tokens, trained.encoder.has_decoder) == (0.25, 12, True)
    with pytest.raises(ValueError, match="no best checkpoint with model weights.*eclip export --best"):
        load(whole, "cpu", which="best")


def test_it_opens_without_the_machinery_of_checkpoints(whole: Path) -> None:
    code = (
        "import sys; sys.modules['torch.distributed.checkpoint'] = None\n"  # importing it would raise
        "import eclip, torch.distributed as dist\n"
        f"model = eclip.load({str(whole)!r}, 'cpu')\n"
        "assert model.embed_texts('a red chair').shape == (1, 16) and not dist.is_initialized()\n"
    )
    run_command([sys.executable, "-c", code])


def test_int8_rows_miss_by_half_a_step_at_most(model: ECLIP) -> None:
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    tensors["text_encoder.word_embedding.weight"][3] = 0
    stored = quantised(model, tensors)
    back = dequantised(stored)
    assert back.keys() == tensors.keys()
    for name, value in tensors.items():
        if stored[name].dtype != torch.int8:
            assert value.ndim != 2 or "queries." in name
            assert torch.equal(back[name], value)
            continue
        assert (back[name] - value).abs().le(value.abs().amax(1, keepdim=True) / 254 * 1.0001).all()
    assert stored["text_encoder.word_embedding.weight"][3].eq(0).all()


def test_int8_is_read_as_any_other(model: ECLIP, facts: Facts, folder: Path) -> None:
    size = (folder / "model.safetensors").stat().st_size
    write_exported(folder, model, Tokenizer.train(WORDS, 128), Facts(**{**vars(facts), "weights": "int8"}))
    assert (folder / "model.safetensors").stat().st_size < size / 2
    read, found, _ = read_exported(folder)
    assert found.weights == "int8"
    for a, b in zip(model.state_dict().values(), read.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0.02)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "harm, words",
    [
        (lambda f: (f / "config.json").unlink(), r"config.json: missing, an exported folder has one; copy or download"),
        (lambda f: (f / "model.safetensors").unlink(), "model.safetensors: cannot be read .No such file"),
        (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json: cannot be read .No such file"),
        (lambda f: truncate(f / "config.json"), "config.json: cannot be read .*copy or download"),
        (lambda f: (f / "config.json").write_text("[1]"), "another program's, not one that eclip export wrote"),
        (lambda f: (f / "config.json").write_text('{"model_type": "clip"}'), r"a model of transformers \(clip\), not"),
        (lambda f: edit(f, version=2), "version 2 of the format, written by eclip .*reads versions up to 1: install"),
        (lambda f: edit(f, version="1"), "version '1' of the format"),
        (lambda f: edit(f, version=None), "version None of the format"),
        (lambda f: edit(f, model={"image_sise": 3}), "ModelConfig has no setting image_sise"),
        (lambda f: edit(f, model={"image_size": 33}), "image_size=33 is not a multiple of patch_size=12"),
        (lambda f: edit(f, model=[]), "the settings of ModelConfig are list"),
        (lambda f: edit(f, model=None), "config.json: .*model"),
        (lambda f: edit(f, max_tokens=None), "config.json: .*max_tokens"),
        (lambda f: edit(f, max_tokens="9"), "max_tokens='9'"),
        (lambda f: edit(f, threshold=1.5), "threshold=1.5: 0 <= threshold < 1"),
        (lambda f: edit(f, trains_decoder="no"), "trains_decoder='no': use true or false"),
        (lambda f: edit(f, weights="int4"), "weights='int4': use float32 or int8"),
        (lambda f: edit(f, files=None), "does not say how long tokenizer.json is"),
        (lambda f: edit(f, files={"tokenizer.json": 3}), "does not say how long tokenizer.json is"),
        (lambda f: truncate(f / "model.safetensors"), r"model.safetensors: \d+ bytes, \d+ were written: a copy"),
        (lambda f: truncate(f / "tokenizer.json"), r"tokenizer.json: \d+ bytes, \d+ were written"),
        (lambda f: flip(f / "model.safetensors"), r"model.safetensors: damaged, .*SHA-256 differs"),
        (lambda f: flip(f / "tokenizer.json"), r"tokenizer.json: damaged, .*SHA-256 differs"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), "it is empty; copy or download"),
        (lambda f: (f / "model.safetensors").write_text("version https://git-lfs"), "Git LFS pointer.*git lfs pull"),
        (lambda f: rewrite(f, lambda t: t.pop("logit_scale")), "logit_scale is not in it"),
        (lambda f: rewrite(f, lambda t: t.update(more=t["logit_scale"] + 1)), "more is in it, and in no model"),
        (lambda f: rewrite(f, lambda t: t.update(logit_scale=torch.ones(2))), r"has shape \(2,\), the settings ask"),
        (lambda f: rewrite(f, lambda t: t["logit_scale"].fill_(float("nan"))), "logit_scale holds NaN or infinity"),
    ],
)  # fmt: skip
def test_a_folder_that_is_wrong_is_one_line(folder: Path, harm: Callable[[Path], None], words: str) -> None:
    harm(folder)
    assert is_exported(folder)
    with pytest.raises(ValueError, match=words) as refusal:
        load(folder, "cpu")
    assert "\n" not in str(refusal.value)


def test_what_is_no_exported_folder(tmp_path: Path) -> None:
    assert not is_exported(tmp_path) and not is_exported(tmp_path / "gone")
    (tmp_path / "config.json").write_text("{")
    assert not is_exported(tmp_path)
    with pytest.raises(ValueError, match="no such folder; give the folder of a run .* or one that eclip export wrote"):
        load(tmp_path / "gone", "cpu")
