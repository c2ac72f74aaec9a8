"""What a resume refuses, that a refusal changes nothing, and what a resume says."""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import eclip.training.build
import eclip.training.prepare
from eclip.presets import PRESETS
from eclip.train import CannotStart, train
from eclip.training.checkpoint import load_run
from eclip.training.checkpoint.files import list_checkpoints
from eclip.training.checkpoint.run_folder import read_config
from tests.dataloading.fixtures import make_split
from tests.training.run_folders import ALONE, assert_refused, contents, make_config

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),
    pytest.mark.usefixtures("no_patience"),
]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 1}, r"another seed \(the run has 0, the flags give 1\)"),
        ({"global_batch_size": 4}, "another global_batch_size"),
        ({"objective": "clip"}, "another objective"),
        ({"soft_labels": "none"}, "another soft_labels"),
        ({"ema_momentum": 0.5}, "another ema_momentum"),
        ({"inter_temperature": 0.2, "intra_weight": 0.0}, "another intra_weight .*another inter_temperature"),
        ({"token_keep": 0.5}, "another token_keep"),
        ({"lock_image": True}, r"another lock_image \(the run has False, the flags give True\)"),
        ({"lock_text": True}, "another lock_text"),
        ({"decoder_depth": 2}, "another decoder_depth"),
        ({"pixel_statistics": "half"}, "another pixel_statistics"),
        ({"max_tokens": 20}, "another max_tokens"),
        ({"demo_products": 30}, "another demo_products"),
        ({"steps": 1}, r"2 steps are done, --steps 1 asks for fewer: .*--steps above 2.*eclip\.evaluate --checkpoint"),
    ],
)
def test_a_resume_that_would_mean_something_else_is_refused(
    data_dir: Path, run_dir: Path, changes: dict[str, Any], words: str
) -> None:
    assert_refused(make_config(data_dir, run_dir, **{"resume": True, "steps": 4, **changes}), words)


def test_a_resume_on_other_data_is_refused(data_dir: Path, run_dir: Path, tmp_path: Path) -> None:
    other = make_split(tmp_path / "other", products=10, images=4, tars=1)
    config = make_config(other, run_dir, resume=True, steps=4)
    assert_refused(config, f"{other}: its train split is not the one that {run_dir} began with .*, of {data_dir}")
    (run_dir / "data.json").unlink()  # as an older version left it: the loader's state knows the train split
    before = contents(run_dir)
    with pytest.raises(CannotStart, match="fingerprint="):
        train(config, ALONE)
    after = contents(run_dir)
    assert after | {".lock": None} == before | {".lock": None}  # it names the last process that took it


def test_a_resume_with_another_vocabulary_is_refused(data_dir: Path, run_dir: Path, tmp_path: Path) -> None:
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocab = tmp_path / "vocab.txt"
    vocab.write_text("\n".join([*specials, "title", "of", "kind"]) + "\n")
    assert_refused(
        make_config(data_dir, run_dir, resume=True, steps=4, vocab_file=vocab), "--vocab-file .*not the vocabulary"
    )
    # The one it was trained with, at another place; and then no file at all.
    own = json.loads((run_dir / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"]
    vocab.write_text("".join(f"{piece}\n" for piece in sorted(own, key=own.__getitem__)))
    assert train(make_config(data_dir, run_dir, resume=True, steps=3, vocab_file=vocab), ALONE)
    vocab.unlink()
    assert train(make_config(data_dir, run_dir, resume=True, steps=4, vocab_file=vocab), ALONE)


HARM: dict[str, tuple[Callable[[Path], object], str]] = {
    "config gone": (lambda r: (r / "config.json").unlink(), "config.json: missing"),
    "config empty": (lambda r: os.truncate(r / "config.json", 0), "config.json: not JSON"),
    "config cut": (lambda r: os.truncate(r / "config.json", 300), "config.json: not JSON"),
    "config no text": (lambda r: (r / "config.json").write_bytes(b"\xff\xfe\x00"), "config.json: "),
    "config a list": (lambda r: (r / "config.json").write_text("[]"), "config.json: .* are list, not an object"),
    "another version": (
        lambda r: (r / "config.json").write_text((r / "config.json").read_text().replace('"seed"', '"seeds"')),
        "config.json: RunConfig has no setting seeds",
    ),
    "wrong type": (
        lambda r: (r / "config.json").write_text((r / "config.json").read_text().replace('"seed": 0', '"seed": "a"')),
        "config.json: seed='a': use a whole number",
    ),
    "part missing": (
        lambda r: (r / "config.json").write_text(json.dumps({"preset": "debug", "model": 1})),
        "config.json: the settings of ModelConfig are int",
    ),
    "tokenizer gone": (lambda r: (r / "tokenizer" / "tokenizer.json").unlink(), "tokenizer.json: no tokenizer there"),
    "tokenizer cut": (lambda r: os.truncate(r / "tokenizer" / "tokenizer.json", 99), "not the vocabulary"),
    "data record cut": (lambda r: os.truncate(r / "data.json", 20), "data.json: "),
    "data record a list": (lambda r: (r / "data.json").write_text("[]"), "data.json: holds no fingerprints"),
    "no whole checkpoint": (
        lambda r: [os.truncate(p / "__0_0.distcp", 9) for p in list_checkpoints(r)], "no checkpoint is whole",
    ),
    "states gone": (lambda r: [(p / "state.json").unlink() for p in list_checkpoints(r)], "no checkpoint is whole"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HARM)
def test_a_damaged_run_is_refused_in_one_line(data_dir: Path, run_dir: Path, kind: str) -> None:
    harm, words = HARM[kind]
    harm(run_dir)
    assert_refused(make_config(data_dir, run_dir, resume=True, steps=4), words)


def test_a_checkpoint_that_does_not_fit_is_refused_before_anything_is_written(data_dir: Path, run_dir: Path) -> None:
    """config.json agrees with the flags, the weights do not: found at loading, the last check of all."""
    text = (run_dir / "config.json").read_text()
    (run_dir / "config.json").write_text(text.replace('"decoder_depth": 1', '"decoder_depth": 2'))
    before = contents(run_dir)
    with pytest.raises(CannotStart, match=r"instance_decoder\.blocks\.1.* is not in it"):
        train(make_config(data_dir, run_dir, resume=True, steps=4, decoder_depth=2), ALONE)
    after = contents(run_dir)
    assert {name for name in before if after.get(name) != before[name]} <= {".lock"}
    assert after.keys() == before.keys()


def test_what_may_change_is_said_and_saved(
    data_dir: Path, run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(data_dir.parent)  # the same folder, by another name
    relative = Path(data_dir.name)
    config = make_config(relative, run_dir, resume=True, steps=4, learning_rate=5e-4, schedule="cosine", flip=False)
    assert train(config, ALONE)
    said = capsys.readouterr().out
    assert "resumed at step 2" in said
    assert (
        "resumed with changed settings: steps 2 -> 4, checkpoint_every 1 -> 5, flip True -> False, "
        "learning_rate 0.001 -> 0.0005, schedule linear -> cosine\n"
    ) in said
    assert read_config(run_dir).optim.schedule == "cosine"
    assert (run_dir / "notes.txt").read_text() == "mine"


def test_a_complete_run_keeps_its_settings(data_dir: Path, run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(run_dir)
    assert train(make_config(data_dir, run_dir, resume=True, learning_rate=0.5, checkpoint_every=1), ALONE)
    said = capsys.readouterr().out
    assert "all 2 steps are done" in said
    assert "learning_rate" not in said
    after = contents(run_dir)
    assert {n for n in before if after[n] != before[n] and n != ".lock"} == {"config.json"}
    assert read_config(run_dir).optim == PRESETS["debug"].optim


def test_a_damaged_newest_checkpoint_is_set_aside(
    data_dir: Path, run_dir: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    os.truncate(run_dir / "checkpoints" / "step_00000002" / "__0_0.distcp", 1000)
    (run_dir / "checkpoints" / "step_00000007.partial").mkdir()  # of runs that were killed
    (run_dir / "config.json.partial").write_text("{")
    assert train(make_config(data_dir, run_dir, resume=True, steps=3, keep_checkpoints=2), ALONE)
    assert "resumed at step 1 " in capsys.readouterr().out
    assert "step_00000002/__0_0.distcp: 1000 bytes" in caplog.text
    assert {p.name for p in (run_dir / "checkpoints").iterdir()} == {
        "step_00000001", "step_00000002.damaged", "step_00000003", "best",
    }  # fmt: skip
    assert not list(run_dir.glob("*.partial"))


def test_locked_towers_come_from_the_checkpoint(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On resume the towers' file may be gone or another: the model and the feature cache are those of the run."""
    loaded = []

    def load(encoder: torch.nn.Module, path: Path, *args: Any, **options: Any) -> None:
        loaded.append(path)
        for parameter in encoder.parameters():
            torch.nn.init.constant_(parameter, 0.01)

    monkeypatch.setattr(eclip.training.build, "load_image_weights", load)
    shards, tower = tmp_path / "shards", tmp_path / "tower.safetensors"
    shutil.copytree(data_dir, shards)
    tower.write_bytes(b"")
    config = make_config(shards, tmp_path / "run", steps=1, lock_image=True, cache_features=True, image_weights=tower)
    assert train(config, ALONE)
    cached = {p.name for p in (shards / "features").glob("*.npy")}
    tower.unlink()
    assert train(dataclasses.replace(config, steps=2, resume=True, overwrite=False), ALONE)
    assert loaded == [tower]
    assert {p.name for p in (shards / "features").glob("*.npy")} == cached
    assert all((p == 0.01).all() for p in load_run(tmp_path / "run")[0].image_encoder.parameters())


def test_an_older_checkpoint_that_does_not_say_where_the_data_stood(data_dir: Path, run_dir: Path) -> None:
    (list_checkpoints(run_dir)[-1] / "state.json").write_text('{"step": 2, "world_size": 1}')
    words = "state.json: does not say where the data stood; .*the checkpoint before"
    assert_refused(make_config(data_dir, run_dir, resume=True, steps=3), words)


def test_what_skipped_steps_left_survives_a_resume_and_goes_with_the_run(run_dir: Path, data_dir: Path) -> None:
    """A resumed run meets the same batches again."""
    left = [run_dir / f"nonfinite_step2_rank{rank}.json" for rank in (0, 1)]
    for path in left:
        path.write_text("{}")
    assert train(make_config(data_dir, run_dir, steps=3, resume=True), ALONE)
    assert all(path.read_text() == "{}" for path in left)
    assert train(make_config(data_dir, run_dir, steps=1, overwrite=True), ALONE)
    assert not any(path.exists() for path in left)
