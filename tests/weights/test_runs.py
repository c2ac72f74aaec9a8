"""A run from the files of a CLIP or SigLIP: no shape is typed, and once it has begun it needs the files no more."""

import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from eclip.dataloading.text import Tokenizer
from eclip.presets import parse
from eclip.train import main
from eclip.training.checkpoint import load_run
from tests.dataloading.text.tower_tokenizers import clip_json, siglip_json
from tests.helpers import run_command
from tests.twelve_products import write_twelve_products
from tests.weights.hugging_face import hugging_face_bert, hugging_face_clip, hugging_face_siglip, saved

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
COLOURS, NAMES = ("red", "blue", "green"), ("sofa", "lamp", "desk", "bed")
TITLES = [f"{colour} {name} no {i}" for colour in COLOURS for name in NAMES for i in range(12)]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve products of noise in shards."""
    return write_twelve_products(tmp_path_factory.mktemp("shards"))


def downloaded(folder: Path, kind: str) -> Path:
    """A folder as Hugging Face's hub has it: weights, configuration, tokenizer."""
    vocab = {"clip": clip_json, "siglip": siglip_json}[kind](folder, TITLES)
    size = Tokenizer.from_vocab_file(vocab).vocab_size
    make = {"clip": hugging_face_clip, "siglip": hugging_face_siglip}[kind]
    make(text={"vocab_size": size}).save_pretrained(folder)
    return folder


def flags_of(folder: Path, data_dir: Path, run_dir: Path, *more: str) -> list[str]:
    weights, vocab = str(folder / "model.safetensors"), str(folder / "tokenizer.json")
    files = ["--image-weights", weights, "--text-weights", weights, "--vocab-file", vocab]
    where = ["--data-dir", str(data_dir), "--run-dir", str(run_dir), "--no-evaluate"]
    return ["--preset", "debug", *files, *where, *more]


def test_from_a_clip(data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, run_dir = downloaded(tmp_path / "clip", "clip"), tmp_path / "run"
    flags = flags_of(folder, data_dir, run_dir)
    output = run_command([sys.executable, "-m", "eclip.train", *flags, "--steps", "2", "--learning-rate", "1e-12"])
    assert "g_I starts as visual_projection.weight" in output and "the logit scale starts at 20.1" in output
    model, config, tokenizer = load_run(run_dir)
    assert (config.model.text_architecture, config.model.embed_dim, config.data.max_tokens) == ("clip", 16, 20)
    assert tokenizer.encode(["title"])[0].tolist()[-1] == tokenizer.end_id == tokenizer.vocab_size - 1
    weights = load_file(folder / "model.safetensors")
    for ours, theirs in (
        (model.image_encoder.blocks[1].mlp.fc2.weight, "vision_model.encoder.layers.1.mlp.fc2.weight"),
        (model.text_projection.weight, "text_projection.weight"),
    ):
        torch.testing.assert_close(ours.detach(), weights[theirs], rtol=0, atol=1e-6)
    shutil.rmtree(folder)
    assert main([*flags, "--steps", "3", "--resume"]) == 0, capsys.readouterr().err
    assert main([*flags, "--steps", "4", "--resume", "--vision-depth", "3"]) == 1
    assert "another vision_depth (the run has 2, the flags give 3)" in capsys.readouterr().err
    assert main([*flags, "--steps", "3", "--run-dir", str(tmp_path / "new")]) == 1
    assert "no such file" in capsys.readouterr().err


def test_from_a_siglip(data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Locked, with its features cached: every title has the length that the tower was trained on."""
    folder, run_dir = downloaded(tmp_path / "siglip", "siglip"), tmp_path / "run"
    flags = flags_of(folder, data_dir, run_dir, "--lock-image", "--lock-text", "--cache-features", "--steps", "2")
    assert main(flags) == 0, capsys.readouterr().err
    assert "g_I and g_T both start as the identity" in capsys.readouterr().out
    _, config, tokenizer = load_run(run_dir)
    assert (config.data.max_tokens, config.model.max_positions, config.model.embed_dim) == (12, 12, 32)
    assert tokenizer.encode(["a", "red sofa no 3"], 12)[1].tolist() == [0, 12, 24]
    goes_on = ["--preset", "shop", "--start-from", str(run_dir), "--run-dir", str(tmp_path / "next")]
    begun = parse(goes_on)
    assert (begun.data.max_tokens, begun.model.text_architecture) == (12, "siglip")
    with pytest.raises(SystemExit):
        parse([*goes_on, "--max-tokens", "9"])
    assert "max_tokens=9 with max_positions=12" in capsys.readouterr().err


def test_flags_are_read_over_what_the_files_tell(data_dir: Path, tmp_path: Path) -> None:
    folder = downloaded(tmp_path, "clip")
    config = parse(flags_of(folder, data_dir, tmp_path / "run", "--image-size", "64", "--embed-dim", "24"))
    model = config.model
    assert (model.image_size, model.patch_size, model.embed_dim, model.vision_width) == (64, 8, 24, 32)
    assert (model.num_queries, model.decoder_heads) == (4, 2)  # the preset's
    (tmp_path / "config.json").unlink()
    known = ["--vision-heads", "4", "--text-heads", "3", "--text-activation", "quick_gelu"]
    config = parse(flags_of(folder, data_dir, tmp_path / "run", *known, "--vision-activation", "quick_gelu"))
    assert (config.model.vision_heads, config.model.text_heads) == (4, 3)


def test_the_image_tower_alone(data_dir: Path, tmp_path: Path) -> None:
    folder = downloaded(tmp_path / "clip", "clip")
    bert, vocab = saved(hugging_face_bert(), tmp_path), tmp_path / "vocab.txt"
    flags = ["--preset", "debug", "--image-weights", str(folder / "model.safetensors")]
    config = parse([*flags, "--text-weights", str(bert), "--vocab-file", str(vocab)])
    assert (config.model.vision_architecture, config.model.text_architecture) == ("clip", "bert")
    assert (config.model.text_width, config.model.embed_dim, config.data.max_tokens) == (32, 32, 55)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--max-tokens", "9"], "max_tokens=9 with max_positions=12: SigLIP's text tower .*--max-tokens and"),
        (["--text-pooling", "mean"], "text_pooling=mean with text_architecture=siglip: .*--text-pooling to last"),
        (["--vision-heads", "5"], "vision_width=32 does not divide into vision_heads=5"),
    ],
)
def test_flags_against_a_siglip(
    data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], words: str
) -> None:
    folder = downloaded(tmp_path / "siglip", "siglip")
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        parse(flags_of(folder, data_dir, tmp_path / "run", *more))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert re.search(words, error), error


def test_a_file_that_leaves_something_open_ends_the_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(hugging_face_clip(), tmp_path)
    with pytest.raises(SystemExit) as stop:
        parse(["--preset", "debug", "--image-weights", str(path)])
    assert stop.value.code == 2
    assert "it does not tell vision_heads: put the config.json of that model beside it" in capsys.readouterr().err
