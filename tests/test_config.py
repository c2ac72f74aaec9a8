"""Presets, flags over them, and what is refused."""

import dataclasses
from pathlib import Path

import pytest

from eclip.config import DataConfig, ModelConfig, ObjectiveConfig, OptimConfig, RunConfig
from eclip.presets import PRESETS, parse


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json(name: str) -> None:
    config = PRESETS[name]
    assert config.preset == name
    assert RunConfig.from_json(config.to_json()) == config


def test_default_is_the_demo() -> None:
    assert parse([]) == PRESETS["demo"]


@pytest.mark.parametrize("spelling", [["--preset", "debug"], ["--preset=debug"]])
def test_flags_override_the_preset_wherever_it_stands(spelling: list[str]) -> None:
    flags = ["--global-batch-size", "16", *spelling, "--objective", "clip", "--soft-labels", "catalog"]
    flags += ["--decoder", "dali", "--kernels", "reference", "--image-weights", "a.safetensors"]
    flags += ["--crop-scale", "0.2", "1"]
    config = parse([*flags, "--no-evaluate", "--resume"])
    assert config.preset == "debug"
    assert config.model == dataclasses.replace(PRESETS["debug"].model, kernels="reference")
    assert config.global_batch_size == 16
    assert (config.objective.objective, config.objective.soft_labels) == ("clip", "catalog")
    assert (config.data.decoder, config.data.crop_scale) == ("dali", (0.2, 1.0))
    assert config.image_weights == Path("a.safetensors")
    assert config.resume
    assert not config.evaluate


def test_help_lists_flags_and_presets(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--help"])
    text = capsys.readouterr().out
    for wanted in ("--global-batch-size", "--soft-labels", "--cache-features", "demo_towers", "vit_l16"):
        assert wanted in text


@pytest.mark.parametrize("flags", [["--preset", "huge"], ["--objective", "gan"], ["--no-such-flag"]])
def test_unknown_flags_and_choices_stop(flags: list[str]) -> None:
    with pytest.raises(SystemExit):
        parse(flags)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": 0}, "steps=0"),
        ({"cache_features": True}, "--lock-image"),
        ({"data": DataConfig(max_tokens=65)}, "max_positions=64"),
        ({"checkpoint_every": 0}, "checkpoint_every=0"),
        ({"log_every": 0}, "log_every=0"),
        ({"keep_checkpoints": 0}, "keep_checkpoints=0"),
        ({"preset": "huge"}, "demo_towers"),
    ],
)
def test_rules(change: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(PRESETS["demo"], **change)


def test_model_rules() -> None:
    with pytest.raises(ValueError, match="vision_heads=5"):
        ModelConfig(vision_heads=5)
    with pytest.raises(ValueError, match="use e.g. 96"):
        ModelConfig(image_size=100)


def test_missing_file_is_named(tmp_path: Path) -> None:
    config = dataclasses.replace(PRESETS["debug"], text_weights=tmp_path / "bert.safetensors")
    with pytest.raises(ValueError, match=r"--text-weights .*bert.safetensors: no such file"):
        config.check_files()


def test_json_of_another_version_is_refused() -> None:
    text = PRESETS["debug"].to_json().replace('"steps"', '"stepz"')
    with pytest.raises(ValueError, match="no setting stepz"):
        RunConfig.from_json(text)


@pytest.mark.parametrize(
    ("settings", "change"),
    [
        (ObjectiveConfig, {"gaussian_share": 1.5}),
        (ObjectiveConfig, {"ema_momentum": -0.1}),
        (ObjectiveConfig, {"intra_weight": -1.0}),
        (ObjectiveConfig, {"inter_temperature": 0.0}),
        (OptimConfig, {"learning_rate": 0.0}),
        (OptimConfig, {"warmup_steps": -1}),
    ],
)
def test_numbers_out_of_range_are_named(settings: type, change: dict[str, float]) -> None:
    ((name, value),) = change.items()
    with pytest.raises(ValueError, match=f"{name}={value}: "):
        settings(**change)


def test_a_missing_tower_names_the_way_to_it(tmp_path: Path) -> None:
    config = dataclasses.replace(PRESETS["demo_towers"], image_weights=tmp_path / "image.safetensors")
    with pytest.raises(ValueError, match=r"image\.safetensors: no such file; `make towers/ready`"):
        config.check_files()
