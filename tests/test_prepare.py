"""What a start refuses, that a refusal changes nothing, and what a start records."""

import dataclasses
import json
import os
import resource
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

import eclip.prepare
import eclip.run_folder
import eclip.train
from eclip.checkpoint import load_run
from eclip.checkpoint_files import list_checkpoints
from eclip.config import RunConfig
from eclip.dataloading.lock import alone
from eclip.model.eclip import ECLIP
from eclip.parallel import Ranks
from eclip.prepare import prepare
from eclip.presets import PRESETS
from eclip.run_folder import read_config
from eclip.train import CannotStart, train
from tests.dataloading.fixtures import make_split

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
ALONE = Ranks(rank=0, world_size=1, device=torch.device("cpu"), mesh=None)


@pytest.fixture(autouse=True)
def _no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eclip.run_folder, "_LOCK_PATIENCE", 0.0)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    for split in ("train", "val", "test"):
        make_split(folder, split, products=9, images=4, tars=1)
    return folder


def _config(data_dir: Path, run_dir: Path, **changes: Any) -> RunConfig:
    """The debug preset; changes may name any setting, whichever part it is in."""
    base = PRESETS["debug"]
    wanted = {"data_dir": data_dir, "run_dir": run_dir, "steps": 2, "evaluate": False, **changes}
    parts = {}
    for part in ("model", "data", "objective", "optim"):
        own = {f.name for f in dataclasses.fields(getattr(base, part))} & set(wanted)
        parts[part] = dataclasses.replace(getattr(base, part), **{name: wanted.pop(name) for name in own})
    return dataclasses.replace(base, **parts, **wanted)


@pytest.fixture(scope="module")
def finished(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 2 steps with checkpoints of both; not to be written to."""
    run_dir = tmp_path_factory.mktemp("runs") / "finished"
    assert train(_config(data_dir, run_dir, checkpoint_every=1), ALONE)
    return run_dir


@pytest.fixture
def run_dir(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, with files of a user beside and below it."""
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    (tmp_path / "run" / "checkpoints" / "best").mkdir()
    (tmp_path / "run" / "checkpoints" / "best" / "weights.bin").write_bytes(b"mine")
    return tmp_path / "run"


def _contents(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def _refused(config: RunConfig, words: str) -> None:
    """A start is refused in one line and leaves the run folder as it was."""
    before = _contents(config.run_dir) if config.run_dir.is_dir() else None
    with pytest.raises(CannotStart, match=words) as error:
        train(config, ALONE)
    assert "\n" not in str(error.value)
    assert (_contents(config.run_dir) if config.run_dir.is_dir() else None) == before


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
    _refused(_config(data_dir, run_dir, **{"resume": True, "steps": 4, **changes}), words)


def test_a_resume_on_other_data_is_refused(data_dir: Path, run_dir: Path, tmp_path: Path) -> None:
    other = make_split(tmp_path / "other", products=10, images=4, tars=1)
    config = _config(other, run_dir, resume=True, steps=4)
    _refused(config, f"{other}: its train split is not the one that {run_dir} began with .*, of {data_dir}")
    (run_dir / "data.json").unlink()  # as an older version left it: the loader's state knows the train split
    before = _contents(run_dir)
    with pytest.raises(CannotStart, match="fingerprint="):
        train(config, ALONE)
    after = _contents(run_dir)
    assert after | {".lock": None} == before | {".lock": None}  # it names the last process that took it


def test_a_resume_with_another_vocabulary_is_refused(data_dir: Path, run_dir: Path, tmp_path: Path) -> None:
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocab = tmp_path / "vocab.txt"
    vocab.write_text("\n".join([*specials, "title", "of", "kind"]) + "\n")
    _refused(_config(data_dir, run_dir, resume=True, steps=4, vocab_file=vocab), "--vocab-file .*not the vocabulary")
    # The one it was trained with, at another place; and then no file at all.
    own = json.loads((run_dir / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"]
    vocab.write_text("".join(f"{piece}\n" for piece in sorted(own, key=own.__getitem__)))
    assert train(_config(data_dir, run_dir, resume=True, steps=3, vocab_file=vocab), ALONE)
    vocab.unlink()
    assert train(_config(data_dir, run_dir, resume=True, steps=4, vocab_file=vocab), ALONE)


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
    _refused(_config(data_dir, run_dir, resume=True, steps=4), words)


def test_a_checkpoint_that_does_not_fit_is_refused_before_anything_is_written(data_dir: Path, run_dir: Path) -> None:
    """config.json agrees with the flags, the weights do not: found at loading, the last check of all."""
    text = (run_dir / "config.json").read_text()
    (run_dir / "config.json").write_text(text.replace('"decoder_depth": 1', '"decoder_depth": 2'))
    before = _contents(run_dir)
    with pytest.raises(CannotStart, match=r"instance_decoder\.blocks\.1.* is not in it"):
        train(_config(data_dir, run_dir, resume=True, steps=4, decoder_depth=2), ALONE)
    after = _contents(run_dir)
    assert {name for name in before if after.get(name) != before[name]} <= {".lock"}
    assert after.keys() == before.keys()


def test_what_may_change_is_said_and_saved(
    data_dir: Path, run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(data_dir.parent)  # the same folder, by another name
    relative = Path(data_dir.name)
    config = _config(relative, run_dir, resume=True, steps=4, learning_rate=5e-4, schedule="cosine", flip=False)
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
    before = _contents(run_dir)
    assert train(_config(data_dir, run_dir, resume=True, learning_rate=0.5, checkpoint_every=1), ALONE)
    said = capsys.readouterr().out
    assert "all 2 steps are done" in said
    assert "learning_rate" not in said
    after = _contents(run_dir)
    assert {n for n in before if after[n] != before[n] and n != ".lock"} == {"config.json"}
    assert read_config(run_dir).optim == PRESETS["debug"].optim


def test_a_damaged_newest_checkpoint_is_set_aside(
    data_dir: Path, run_dir: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    os.truncate(run_dir / "checkpoints" / "step_00000002" / "__0_0.distcp", 1000)
    (run_dir / "checkpoints" / "step_00000007.partial").mkdir()  # of runs that were killed
    (run_dir / "config.json.partial").write_text("{")
    assert train(_config(data_dir, run_dir, resume=True, steps=3, keep_checkpoints=2), ALONE)
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

    monkeypatch.setattr(eclip.train, "load_image_weights", load)
    shards, tower = tmp_path / "shards", tmp_path / "tower.safetensors"
    shutil.copytree(data_dir, shards)
    tower.write_bytes(b"")
    config = _config(shards, tmp_path / "run", steps=1, lock_image=True, cache_features=True, image_weights=tower)
    assert train(config, ALONE)
    cached = {p.name for p in (shards / "features").glob("*.npy")}
    tower.unlink()
    assert train(dataclasses.replace(config, steps=2, resume=True, overwrite=False), ALONE)
    assert loaded == [tower]
    assert {p.name for p in (shards / "features").glob("*.npy")} == cached
    assert all((p == 0.01).all() for p in load_run(tmp_path / "run")[0].image_encoder.parameters())


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
    _refused(_config(**{"data_dir": data_dir, "run_dir": run_dir, **changes}), words)


def test_a_model_that_cannot_be_built_loses_nothing(
    data_dir: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(*args: Any, **options: Any) -> ECLIP:
        raise ValueError("the weights file is another kind of tower")

    monkeypatch.setattr("eclip.train.build_model", build)
    before = _contents(run_dir)
    with pytest.raises(CannotStart, match="another kind of tower"):
        train(_config(data_dir, run_dir, overwrite=True), ALONE)
    assert {n: v for n, v in _contents(run_dir).items() if n != ".lock"} == {
        n: v for n, v in before.items() if n != ".lock"
    }
    fresh = run_dir.parent / "above" / "fresh"
    with pytest.raises(CannotStart, match="another kind of tower"):
        train(_config(data_dir, fresh), ALONE)
    assert not fresh.parent.exists()


def test_overwrite_deletes_what_a_run_wrote_and_nothing_else(data_dir: Path, run_dir: Path) -> None:
    for name in ("evaluation.json", "grounding.png", "wandb.json", "nonfinite_step3_rank0.json", "config.json.partial"):
        (run_dir / name).write_text("{}")
    (run_dir / "tensorboard").mkdir()
    (run_dir / "tensorboard" / "events.out.tfevents.1.host").write_text("")
    assert train(_config(data_dir, run_dir, overwrite=True, steps=1), ALONE)
    assert {name for name, content in _contents(run_dir).items() if content is not None} == {
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
    _refused(_config(data_dir, folder, **flag), f"bert holds {name}, which no run of this program wrote")


def test_a_folder_with_other_files_serves_and_keeps_them(data_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "slurm-12.out").write_text("log")
    assert train(_config(data_dir, tmp_path, steps=1, overwrite=True), ALONE)
    assert (tmp_path / "slurm-12.out").read_text() == "log"


def test_a_run_dir_that_is_a_file_is_refused(data_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for folder, words in ((tmp_path / "file", "a file; choose a folder"), (tmp_path / "file" / "below", "file")):
        for flags in ({}, {"overwrite": True}, {"resume": True}):
            with pytest.raises(CannotStart, match=words) as error:
                train(_config(data_dir, folder, **flags), ALONE)
            assert "\n" not in str(error.value)
    assert (tmp_path / "file").read_text() == "mine"


def test_presets_replace_only_their_own_disposable_folder(
    data_dir: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, preset in PRESETS.items():
        assert not preset.overwrite, name
    _refused(_config(data_dir, run_dir), "holds the checkpoints")
    monkeypatch.chdir(run_dir.parent)
    config = _config(data_dir, PRESETS["debug"].run_dir, steps=1)
    for _ in range(2):
        assert train(config, ALONE)
    shutil.rmtree("runs/debug")
    shutil.copytree(run_dir, "runs/demo")
    _refused(_config(data_dir, PRESETS["demo"].run_dir), "holds the checkpoints")


def test_a_folder_that_another_run_writes_to_is_refused(data_dir: Path, run_dir: Path) -> None:
    for flags in ({"resume": True, "steps": 4}, {"overwrite": True}, {}):
        with alone(run_dir / ".lock"):
            _refused(_config(data_dir, run_dir, **flags), rf"a run writes there now \(process {os.getpid()} on ")
    with alone(run_dir / ".lock"):
        load_run(run_dir)  # reading is fine
    assert train(_config(data_dir, run_dir, resume=True, steps=3), ALONE)


def test_a_run_that_came_between_check_and_lock_is_noticed(
    data_dir: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = eclip.prepare._tokenizer

    def interfere(*args: Any) -> Any:
        newest = list_checkpoints(run_dir)[-1]
        shutil.copytree(newest, newest.with_name("step_00000009"))
        return make(*args)

    monkeypatch.setattr(eclip.prepare, "_tokenizer", interfere)
    with pytest.raises(CannotStart, match="another run wrote checkpoints there meanwhile"):
        train(_config(data_dir, run_dir, resume=True, steps=4), ALONE)


def test_the_data_are_recorded_by_absolute_path_and_fingerprint(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = tmp_path / "shards"
    shutil.copytree(data_dir, shards)
    (shards / "test-000000.tar").write_bytes(b"no tar")
    (shards / "val-000000.tar").unlink()
    monkeypatch.chdir(tmp_path)
    assert train(_config(Path("shards"), Path("run"), steps=1), ALONE)
    assert "the test split is not recorded: " in capsys.readouterr().out
    record = json.loads(Path("run/data.json").read_text())
    assert record["data_dir"] == str(shards)
    assert record["fingerprints"].keys() == {"train"}
    assert read_config(Path("run")).data.data_dir == shards
    # A split that came later is added, one that changed keeps its first fingerprint and is named.
    make_split(shards, "val", products=9, images=4, tars=1)
    shutil.copy(data_dir / "test-000000.tar", shards)
    assert train(_config(Path("shards"), Path("run"), steps=2, resume=True), ALONE)
    first = json.loads(Path("run/data.json").read_text())["fingerprints"]
    assert first.keys() == {"train", "val", "test"}
    make_split(shards, "val", products=8, images=4, tars=1)
    assert train(_config(Path("shards"), Path("run"), steps=3, resume=True), ALONE)
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
    before = _contents(folder)
    flags = {"resume": kind == "resume", "overwrite": kind == "overwrite", "steps": 4}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        with pytest.raises(CannotStart, match=r"(\.lock|config\.json|tokenizer\.json): cannot be written") as error:
            train(_config(data_dir, folder, **flags), ALONE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(error.value)
    after = _contents(folder)
    assert {n: v for n, v in after.items() if n != ".lock"} == {n: v for n, v in before.items() if n != ".lock"}


def test_the_lock_is_let_go_at_the_end(data_dir: Path, tmp_path: Path) -> None:
    with ExitStack() as hold:
        prepare(_config(data_dir, tmp_path), ALONE, hold)
        with pytest.raises(ValueError, match="a run writes there now"):
            prepare(_config(data_dir, tmp_path), ALONE, ExitStack())
    with ExitStack() as hold:
        prepare(_config(data_dir, tmp_path), ALONE, hold)
