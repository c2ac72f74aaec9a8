"""--start-from: what is taken along, what is refused before anything is written, and that it is needed once."""

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from eclip.config import RunConfig
from eclip.model.eclip import ECLIP
from eclip.presets import parse
from eclip.train import train
from eclip.training.build import build_model
from eclip.training.checkpoint import load_run
from eclip.training.momentum import make_momentum
from eclip.weights.exported import Facts, write_exported
from tests.helpers import ROOT
from tests.training.run_folders import ALONE, assert_refused, contents, make_config

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),
    pytest.mark.usefixtures("no_patience"),
]


def started(data_dir: Path, run_dir: Path, start: Path, **changes: Any) -> RunConfig:
    model = load_run(start)[1].model
    return dataclasses.replace(make_config(data_dir, run_dir, start_from=start, **changes), model=model)


def equal(one: ECLIP, other: ECLIP) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_a_run_begins_with_the_weights_and_the_vocabulary(data_dir: Path, finished: Path, tmp_path: Path) -> None:
    config = started(data_dir, tmp_path / "run", finished, steps=0, seed=9)
    theirs, saved, tokenizer = load_run(finished)
    model = build_model(config)
    assert equal(model, theirs)
    assert equal(make_momentum(model), theirs)
    assert train(config, ALONE)  # no step: the weights as they are, as the checkpoint of step 0
    kept, own, vocabulary = load_run(config.run_dir)
    assert equal(kept, theirs)
    assert own.model == saved.model
    assert vocabulary.encode(["a red chair"], 9)[0].tolist() == tokenizer.encode(["a red chair"], 9)[0].tolist()
    assert [path.name for path in (config.run_dir / "checkpoints").iterdir()] == ["step_00000000"]


def test_a_begun_run_needs_the_other_no_more(data_dir: Path, run_dir: Path, tmp_path: Path) -> None:
    config = started(data_dir, tmp_path / "new", run_dir, steps=0)
    assert train(config, ALONE)
    shutil.rmtree(run_dir)
    assert train(dataclasses.replace(config, steps=2, resume=True), ALONE)
    assert (config.run_dir / "checkpoints" / "step_00000002").is_dir()


def test_what_cannot_be_started_from_is_refused(data_dir: Path, run_dir: Path, tmp_path: Path) -> None:
    config = started(data_dir, tmp_path / "new", run_dir)
    assert_refused(dataclasses.replace(config, start_from=tmp_path / "gone"), "--start-from .*gone: no such folder")
    assert_refused(dataclasses.replace(config, start_from=tmp_path), "no checkpoint there; give the folder")
    assert_refused(dataclasses.replace(config, run_dir=run_dir, overwrite=True), "the run's own folder; .*--resume")
    deeper = dataclasses.replace(config.model, decoder_depth=2, vision_depth=3)
    words = r"another vision_depth \(it has 1, the flags give 3\), another decoder_depth .*leave --vision-depth and"
    assert_refused(dataclasses.replace(config, model=deeper), words)
    for file in (run_dir / "checkpoints").glob("step_*/__0_0.distcp"):
        file.write_bytes(file.read_bytes()[:-1])
    assert_refused(config, "--start-from .*__0_0.distcp")
    assert not config.run_dir.exists()


@pytest.mark.parametrize("flag", ["image_weights", "text_weights", "vocab_file"])
def test_other_weights_contradict_it(flag: str) -> None:
    files = {"vocab_file": Path("v"), flag: Path("other")} if flag == "text_weights" else {flag: Path("other")}
    with pytest.raises(ValueError, match=r"--start-from runs/x: that run brings its weights .*leave one of the two"):
        make_config(Path("data"), Path("run"), start_from=Path("runs/x"), **files)


@pytest.fixture
def exported(finished: Path, tmp_path: Path) -> Path:
    model, config, tokenizer = load_run(finished)
    folder = tmp_path / "exported"
    folder.mkdir()
    facts = Facts(model=config.model, max_tokens=config.data.max_tokens, objective="eclip", trains_decoder=True)
    write_exported(folder, model, tokenizer, facts)
    return folder


def test_an_exported_model_is_a_start_as_its_run_is(
    data_dir: Path, finished: Path, exported: Path, tmp_path: Path
) -> None:
    config = dataclasses.replace(
        make_config(data_dir, tmp_path / "new", start_from=exported, steps=0, seed=9), model=load_run(finished)[1].model
    )
    assert train(config, ALONE)
    kept, own, _ = load_run(config.run_dir)
    assert equal(kept, load_run(finished)[0])
    assert own.model == load_run(finished)[1].model
    shutil.rmtree(exported)
    assert train(dataclasses.replace(config, steps=1, resume=True), ALONE)


def test_an_exported_model_that_cannot_be_started_from(data_dir: Path, exported: Path, tmp_path: Path) -> None:
    config = make_config(data_dir, tmp_path / "new", start_from=exported)
    deeper = dataclasses.replace(config.model, vision_depth=3)
    assert_refused(dataclasses.replace(config, model=deeper), r"another vision_depth \(it has 1, the flags give 3\)")
    weights = exported / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert_refused(config, "--start-from .*model.safetensors: .* a copy stopped")
    (exported / "config.json").write_text('{"model_type": "clip"}')
    assert_refused(config, r"--start-from .*a model of transformers \(clip\), not one that eclip export wrote")
    assert not config.run_dir.exists()


def test_flags_are_read_over_an_exported_models_settings(finished: Path, exported: Path) -> None:
    model = load_run(finished)[1].model
    for preset in ("demo_towers", "shop"):
        assert parse(["--preset", preset, "--start-from", str(exported)]).model == model
    reference = parse(["--start-from", str(exported), "--kernels", "reference"]).model
    assert reference == dataclasses.replace(model, kernels="reference")


def test_flags_are_read_over_the_started_models_settings(run_dir: Path) -> None:
    model = load_run(run_dir)[1].model
    for preset in ("demo_towers", "vit_b16", "shop"):
        config = parse(["--preset", preset, "--start-from", str(run_dir)])
        assert config.model == model
        assert (config.vocab_file, config.image_weights) == (None, None)
    assert parse(["--start-from", str(run_dir), "--num-queries", "5"]).model.num_queries == 5
    assert parse(["--preset", "shop", "--start-from", str(run_dir / "gone")]).start_from == run_dir / "gone"
    gone = ["--preset", "shop", "--start-from", str(run_dir / "gone"), "--run-dir", str(run_dir), "--resume"]
    assert parse(gone).model == model


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "eclip.train", *flags]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_the_presets_line_as_a_user_types_it(data_dir: Path, run_dir: Path, tmp_path: Path) -> None:
    flags = ["--preset", "shop", "--data-dir", str(data_dir), "--run-dir", str(tmp_path / "shop"), "--no-evaluate"]
    missing = run(*flags, "--start-from", str(tmp_path / "gone"))
    assert missing.returncode == 1
    assert "make train" in missing.stderr and len(missing.stderr.splitlines()) == 1
    before = contents(run_dir)
    kept = run(*flags, "--start-from", str(run_dir))
    assert kept.returncode == 0, kept.stderr
    assert "9 products are too few to train on" in kept.stdout
    trained = run(*flags, "--start-from", str(run_dir), "--steps", "2", "--global-batch-size", "8", "--overwrite")
    assert trained.returncode == 0, trained.stderr
    assert (tmp_path / "shop" / "checkpoints" / "step_00000002").is_dir()
    assert contents(run_dir) == before
