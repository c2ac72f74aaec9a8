"""What a start refuses, that a refusal changes nothing, and what a start records."""

import dataclasses
import json
import os
import shutil
import signal
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import eclip.training.prepare
from eclip.dataloading.packing import replace_shards
from eclip.dataloading.shards import ShardIndex
from eclip.dataloading.system.lock import alone
from eclip.model.eclip import ECLIP
from eclip.parallel.signals import Stopped
from eclip.presets import PRESETS
from eclip.train import CannotStart, train
from eclip.training.checkpoint import load_run
from eclip.training.checkpoint.files import list_checkpoints
from eclip.training.checkpoint.run_folder import read_config
from eclip.training.prepare import prepare, single_image_note
from tests.dataloading.fixtures import make_split
from tests.helpers import file_size_limit
from tests.training.run_folders import ALONE, assert_refused, contents, make_config

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),
    pytest.mark.usefixtures("no_patience"),
]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "holds the checkpoints of an earlier run"),
        ({"overwrite": True, "vocab_file": Path("gone.txt")}, "no such file"),
        ({"overwrite": True, "data_dir": Path("nowhere")}, "train-000000.tar"),
        ({"overwrite": True, "global_batch_size": 2}, "at least 4"),
        ({"overwrite": True, "decoder": "dali", "num_workers": 0, "image_weights": Path("gone")}, "no such file"),
        ({"overwrite": True, "vocab_size": 20}, "vocab_size=20"),
    ],
)
def test_overwrite_deletes_only_once_all_else_is_checked(
    data_dir: Path, run_dir: Path, changes: dict[str, Any], words: str
) -> None:
    assert_refused(make_config(**{"data_dir": data_dir, "run_dir": run_dir, **changes}), words)


def test_a_model_that_cannot_be_built_loses_nothing(
    data_dir: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(*args: Any, **options: Any) -> ECLIP:
        raise ValueError("the weights file is another kind of tower")

    monkeypatch.setattr("eclip.training.trainer.build_model", build)
    before = contents(run_dir)
    with pytest.raises(CannotStart, match="another kind of tower"):
        train(make_config(data_dir, run_dir, overwrite=True), ALONE)
    assert {n: v for n, v in contents(run_dir).items() if n != ".lock"} == {
        n: v for n, v in before.items() if n != ".lock"
    }
    fresh = run_dir.parent / "above" / "fresh"
    with pytest.raises(CannotStart, match="another kind of tower"):
        train(make_config(data_dir, fresh), ALONE)
    assert not fresh.parent.exists()


def test_overwrite_deletes_what_a_run_wrote_and_nothing_else(data_dir: Path, run_dir: Path) -> None:
    for name in ("evaluation.json", "grounding.png", "wandb.json", "nonfinite_step3_rank0.json", "config.json.partial"):
        (run_dir / name).write_text("{}")
    (run_dir / "tensorboard").mkdir()
    (run_dir / "tensorboard" / "events.out.tfevents.1.host").write_text("")
    assert train(make_config(data_dir, run_dir, overwrite=True, steps=1), ALONE)
    assert {name for name, content in contents(run_dir).items() if content is not None} == {
        ".lock", "config.json", "data.json", "tokenizer/tokenizer.json", "metrics.jsonl",
        "checkpoints/step_00000001/.metadata", "checkpoints/step_00000001/__0_0.distcp",
        "checkpoints/step_00000001/state.json",
        "notes.txt", "checkpoints/best/weights.bin",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["config.json", "tokenizer", "checkpoints", "metrics.jsonl"])
@pytest.mark.parametrize("flag", [{}, {"overwrite": True}, {"resume": True}])
def test_another_programs_folder_is_refused(data_dir: Path, tmp_path: Path, name: str, flag: dict[str, bool]) -> None:
    folder = tmp_path / "bert"
    if "." in name:
        folder.mkdir()
        (folder / name).write_text('{"model_type": "bert", "model": "bert"}')
    else:
        (folder / name).mkdir(parents=True)
        (folder / name / "tokenizer.json").write_text("{}")
    assert_refused(make_config(data_dir, folder, **flag), f"bert holds {name}, which no run of this program wrote")


def test_a_folder_with_other_files_serves_and_keeps_them(data_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "slurm-12.out").write_text("log")
    assert train(make_config(data_dir, tmp_path, steps=1, overwrite=True), ALONE)
    assert (tmp_path / "slurm-12.out").read_text() == "log"


def test_a_batch_larger_than_the_catalogue_is_said(
    data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for size in (9, 10):
        assert train(make_config(data_dir, tmp_path / str(size), steps=1, global_batch_size=size), ALONE)
        said = "global_batch_size=10 of 9 products: a product meets itself in every step" in capsys.readouterr().out
        assert said == (size == 10)


def test_sizes_of_a_schedule_that_no_step_has_are_said(
    data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A size above the catalogue's is no matter where the run ends before it."""
    for steps in (2, 3):
        config = make_config(data_dir, tmp_path / str(steps), steps=steps, batch_schedule="0:8,2:10,5:12")
        assert train(config, ALONE)
        said = capsys.readouterr().out
        assert ("batch=10 of 9 products" in said) == (steps == 3)
        assert f"the run ends after {steps} steps, before it is at step {2 if steps == 2 else 5}" in said
    assert train(make_config(data_dir, tmp_path / "all", steps=3, batch_schedule="0:4,2:8"), ALONE)
    assert "the run ends" not in capsys.readouterr().out


def test_training_is_told_of_products_with_one_image(tmp_path: Path) -> None:
    index = ShardIndex.open(make_split(tmp_path / "one", products=3, images=1, tars=1), "train")
    config = make_config(tmp_path / "one", tmp_path, lock_image=True, lock_text=True, cache_features=True)
    several = ShardIndex.open(make_split(tmp_path / "several", products=3, images=2, tars=1), "train")
    assert single_image_note(several, config) is None
    uncached = dataclasses.replace(config, cache_features=False)
    assert single_image_note(index, uncached) == (
        "3 of 3 products have one image only: two crops of it make their pair"
    )
    assert "same to the bit" in str(single_image_note(index, dataclasses.replace(config, cached_views=1)))
    four = dataclasses.replace(config, cached_views=4)
    assert "two of the 4 cached views of it" in str(single_image_note(index, four))


def test_a_run_dir_that_is_a_file_is_refused(data_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for folder, words in ((tmp_path / "file", "a file; choose a folder"), (tmp_path / "file" / "below", "file")):
        for flags in ({}, {"overwrite": True}, {"resume": True}):
            with pytest.raises(CannotStart, match=words) as error:
                train(make_config(data_dir, folder, **flags), ALONE)
            assert "\n" not in str(error.value)
    assert (tmp_path / "file").read_text() == "mine"


def test_presets_replace_only_their_own_disposable_folder(
    data_dir: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, preset in PRESETS.items():
        assert not preset.overwrite, name
    assert_refused(make_config(data_dir, run_dir), "holds the checkpoints")
    monkeypatch.chdir(run_dir.parent)
    config = make_config(data_dir, PRESETS["debug"].run_dir, steps=1)
    for _ in range(2):
        assert train(config, ALONE)
    shutil.rmtree("runs/debug")
    shutil.copytree(run_dir, "runs/demo")
    assert_refused(make_config(data_dir, PRESETS["demo"].run_dir), "holds the checkpoints")


def test_a_folder_that_another_run_writes_to_is_refused(data_dir: Path, run_dir: Path) -> None:
    for flags in ({"resume": True, "steps": 4}, {"overwrite": True}, {}):
        with alone(run_dir / ".lock"):
            assert_refused(
                make_config(data_dir, run_dir, **flags), rf"a run writes there now \(process {os.getpid()} on "
            )
    with alone(run_dir / ".lock"):
        load_run(run_dir)  # reading is fine
    assert train(make_config(data_dir, run_dir, resume=True, steps=3), ALONE)


def test_a_run_that_came_between_check_and_lock_is_noticed(
    data_dir: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = eclip.training.prepare._tokenizer

    def interfere(*args: Any) -> Any:
        newest = list_checkpoints(run_dir)[-1]
        shutil.copytree(newest, newest.with_name("step_00000009"))
        return make(*args)

    monkeypatch.setattr(eclip.training.prepare, "_tokenizer", interfere)
    with pytest.raises(CannotStart, match="another run wrote checkpoints there meanwhile"):
        train(make_config(data_dir, run_dir, resume=True, steps=4), ALONE)


@pytest.mark.parametrize("split", ["val", "test"])
def test_an_evaluation_that_would_fail_is_refused_at_the_start(data_dir: Path, tmp_path: Path, split: str) -> None:
    """At the end it needs the test split, and val, if there is one, for its thresholds."""
    shards = tmp_path / "shards"
    shutil.copytree(data_dir, shards)
    (shards / f"{split}-000000.tar").write_bytes(b"no tar")
    config = make_config(shards, tmp_path / "run", steps=1, evaluate=True)
    assert_refused(config, rf"{split}-000000.tar.*; or train with --no-evaluate")
    assert not config.run_dir.exists()


def test_the_data_are_recorded_by_absolute_path_and_fingerprint(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = tmp_path / "shards"
    shutil.copytree(data_dir, shards)
    (shards / "test-000000.tar").write_bytes(b"no tar")
    (shards / "val-000000.tar").unlink()
    monkeypatch.chdir(tmp_path)
    assert train(make_config(Path("shards"), Path("run"), steps=1), ALONE)
    assert "the test split is not recorded: " in capsys.readouterr().out
    record = json.loads(Path("run/data.json").read_text())
    assert record["data_dir"] == str(shards)
    assert record["fingerprints"].keys() == {"train"}
    assert read_config(Path("run")).data.data_dir == shards
    # A split that came later is added, one that changed keeps its first fingerprint and is named.
    make_split(shards, "val", products=9, images=4, tars=1)
    shutil.copy(data_dir / "test-000000.tar", shards)
    assert train(make_config(Path("shards"), Path("run"), steps=2, resume=True), ALONE)
    first = json.loads(Path("run/data.json").read_text())["fingerprints"]
    assert first.keys() == {"train", "val", "test"}
    make_split(shards, "val", products=8, images=4, tars=1)
    assert train(make_config(Path("shards"), Path("run"), steps=3, resume=True), ALONE)
    assert (
        f"the val split is not the one that the run began with (fingerprint {first['val']} -> "
        in capsys.readouterr().out
    )
    assert json.loads(Path("run/data.json").read_text())["fingerprints"] == first
    # The folder moves to a machine without the data: it still opens.
    shutil.move("run", tmp_path / "elsewhere")
    shutil.rmtree(shards)
    load_run(tmp_path / "elsewhere")


@pytest.mark.parametrize("limit", [0, 100, 1500])
@pytest.mark.parametrize("kind", ["fresh", "resume", "overwrite"])
def test_a_full_disk_at_the_start_loses_nothing(data_dir: Path, run_dir: Path, limit: int, kind: str) -> None:
    """Writing beyond `limit` bytes of a file fails, as on a full disk."""
    folder = run_dir if kind != "fresh" else run_dir.parent / "fresh"
    before = contents(folder)
    flags = {"resume": kind == "resume", "overwrite": kind == "overwrite", "steps": 4}
    with (
        file_size_limit(limit),
        pytest.raises(CannotStart, match=r"(\.lock|config\.json|tokenizer\.json): cannot be written") as error,
    ):
        train(make_config(data_dir, folder, **flags), ALONE)
    assert "\n" not in str(error.value)
    after = contents(folder)
    assert {n: v for n, v in after.items() if n != ".lock"} == {n: v for n, v in before.items() if n != ".lock"}


def test_the_lock_is_let_go_at_the_end(data_dir: Path, tmp_path: Path) -> None:
    with ExitStack() as hold:
        prepare(make_config(data_dir, tmp_path), ALONE, hold)
        with pytest.raises(ValueError, match="a run writes there now"):
            prepare(make_config(data_dir, tmp_path), ALONE, ExitStack())
    with ExitStack() as hold:
        prepare(make_config(data_dir, tmp_path), ALONE, hold)


def test_a_vocabulary_that_does_not_know_the_titles_is_refused(data_dir: Path, run_dir: Path, tmp_path: Path) -> None:
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocab = tmp_path / "vocab.txt"

    def refused(pieces: list[str], words: str, **changes: Any) -> None:
        vocab.write_text("\n".join([*specials, *pieces]))
        assert_refused(make_config(data_dir, run_dir, overwrite=True, vocab_file=vocab, **changes), words)

    refused(["Title", "Of", "Kind"], "vocab.txt: a cased vocabulary.*'Title'.*--cased")
    refused(["沙", "发"], r"--vocab-file .*vocab.txt: 100% of .*at most 10% .*'Title'.*language, or say --cased")
    refused(["title", "of", "kind", *"0123456789"], "% of .*'Title'.*leave out --cased", cased=True)
    vocab.write_text("\n".join([*specials, "Title", "of", "kind", "cat", "##0", "##1", "##2", *"0123456789"]))
    assert train(make_config(data_dir, tmp_path / "cased", vocab_file=vocab, cased=True, steps=1), ALONE)
    restored = load_run(tmp_path / "cased")[2]
    assert restored.unk_id not in restored.encode(["Title 3 of kind 1"])[0]


def test_a_stop_while_the_catalogue_is_packed_stays_one(tmp_path: Path) -> None:
    """Training's own exception, which knows the signal, passes through the packer."""
    with pytest.raises(Stopped, match="what was there before is as it was") as stop, replace_shards(tmp_path):
        raise Stopped(signal.SIGTERM)
    assert stop.value.signum == signal.SIGTERM


def test_only_a_demo_presets_own_folder_is_packed(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed: list[Path] = []
    monkeypatch.setattr(eclip.training.prepare, "pack_demo", lambda folder, **settings: packed.append(folder))
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    shutil.copytree(data_dir, "data/debug")
    assert train(make_config(Path("data/debug"), tmp_path / "a", steps=1), ALONE)
    assert train(make_config(data_dir, tmp_path / "b", steps=1), ALONE)
    assert packed == [Path("data/debug")]
