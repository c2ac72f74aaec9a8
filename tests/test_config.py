"""Settings: their ranges, their rules and their JSON."""

import dataclasses
import json
import math
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from eclip.config import DataConfig, OptimConfig, RunConfig
from eclip.model.settings import ModelConfig
from eclip.objectives.settings import ObjectiveConfig
from eclip.presets import PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json(name: str) -> None:
    config = PRESETS[name]
    assert config.preset == name
    assert RunConfig.from_json(config.to_json()) == config


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
        ({"seed": -1}, "seed=-1: set --seed to a number from 0"),
        ({"seed": 2**32}, "seed=4294967296"),
        ({"global_batch_size": 1}, "global_batch_size=1: contrast needs two"),
        ({"cached_views": 0}, "cached_views=0"),
        ({"rank_timeout_seconds": 0}, "rank_timeout_seconds=0"),
        ({"wandb": ""}, "--wandb NAME"),
        ({"objective": ObjectiveConfig(objective="clip", inter_weight=1)}, None),
    ],
)
def test_rules(change: dict, words: str | None) -> None:
    if words is None:
        dataclasses.replace(PRESETS["demo"], **change)
        return
    with pytest.raises(ValueError, match=words) as error:
        dataclasses.replace(PRESETS["demo"], **change)
    assert "\n" not in str(error.value)


KINDS = (ModelConfig, DataConfig, ObjectiveConfig, OptimConfig, RunConfig)


def _numbers(kind: Any) -> Iterator[tuple[str, Any]]:
    """Fields of a dataclass that hold a number, with their default."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if {hints[field.name], *typing.get_args(hints[field.name])} & {int, float} and field.name != "crop_scale":
            yield field.name, hints[field.name]


def _fractional(hint: Any) -> bool:
    return float in (hint, *typing.get_args(hint))


@pytest.mark.parametrize("kind", KINDS)
def test_every_number_has_a_rule(kind: Any) -> None:
    """A new one without: add it to the RULES of its class."""
    names = {name for name, _ in _numbers(kind)}
    assert names == set(kind.RULES)


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (kind, name, value)
        for kind in KINDS
        for name, hint in _numbers(kind)
        for value in (-1, *((math.nan, math.inf, -math.inf) if _fractional(hint) else (1.5,)), "1", True, (1,))
    ],
)
def test_numbers_that_no_setting_takes(kind: Any, name: str, value: Any) -> None:
    """Negative, not finite, not whole, of another type: one line with name, value and flag."""
    with pytest.raises(ValueError, match=rf"^{name}=") as error:
        kind(**{name: value})
    assert f"--{name.replace('_', '-')}" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("share", [(0.0, 1.0), (0.5, 1.5), (0.9, 0.5), (-1.0, 1.0), (math.nan, 1.0), (0.5, math.nan)])
def test_crops_out_of_range(share: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match=r"^crop_scale=\("):
        DataConfig(crop_scale=share)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        (OptimConfig, {"beta1": 0.0, "beta2": 0.0, "weight_decay": 0, "warmup_steps": 0, "learning_rate": 1}),
        (ObjectiveConfig, {"token_keep": 1.0, "ema_momentum": 1.0, "image_prompt_share": 0, "entropy_weight": 0}),
        (DataConfig, {"max_tokens": 3, "num_workers": 0, "crop_scale": (1.0, 1.0), "demo_products": None}),
        (ModelConfig, {"slot_eps": 0.0, "num_queries": 2, "slot_heads": 3}),
        (RunConfig, {"seed": 2**32 - 1, "steps": 1, "global_batch_size": 2}),
    ],
)
def test_limits_that_are_allowed(kind: Any, change: dict[str, Any]) -> None:
    kind(**change)


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        (ModelConfig, {"patch_size": 200}, "image_size=96 is not a multiple of patch_size=200; use e.g. 200"),
        (ModelConfig, {"slot_heads": 5}, "embed_dim=192 does not divide into slot_heads=5"),
        (ModelConfig, {"normalize": "max"}, "normalize='max': use one of mean, den, l1max, sum for --normalize"),
        (ModelConfig, {"token_norm": 1}, "token_norm=1: use true or false"),
        (DataConfig, {"data_dir": "data"}, "data_dir='data': use a path"),
        (DataConfig, {"crop_scale": (0.5,)}, r"crop_scale=\(0.5,\): use 2 numbers"),
        (RunConfig, {"wandb": 3}, "wandb=3: use text"),
        (RunConfig, {"model": None}, "model=None: use settings of ModelConfig"),
        (ObjectiveConfig, {"objective": "clip", "itc_weight": 0.0}, "nothing is left to train on; .*--itc-weight 1"),
        (
            ObjectiveConfig, {f"{n}_weight": 0.0 for n in ("itc", "inter", "itm", "intra", "entropy")},
            "objective=eclip with .*nothing is left",
        ),
    ],
)  # fmt: skip
def test_other_rules(kind: Any, change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        kind(**change)


def test_model_rules() -> None:
    with pytest.raises(ValueError, match="vision_heads=5"):
        ModelConfig(vision_heads=5)
    with pytest.raises(ValueError, match="use e.g. 96"):
        ModelConfig(image_size=100)


def test_missing_file_is_named(tmp_path: Path) -> None:
    config = dataclasses.replace(PRESETS["debug"], image_weights=tmp_path / "vit.safetensors")
    with pytest.raises(ValueError, match=r"--image-weights .*vit.safetensors: no such file"):
        config.check_files()
    config.check_files(resumed=True)  # the run folder has what was in it


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not JSON"),
        ('{"steps": ', "not JSON"),
        ("[]", "RunConfig are list, not an object"),
        ('{"model": []}', "ModelConfig are list, not an object"),
        ('{"RULES": {}}', "no setting RULES"),
        ('{"steps": NaN}', "steps=nan: use a whole number"),
        ('{"optim": {"learning_rate": NaN}}', "learning_rate=nan"),
        ('{"run_dir": 3}', "run_dir=3: use a path"),
        ('{"data": {"crop_scale": 0.5}}', "crop_scale=0.5: use 2 numbers"),
        ('{"data": {"crop_scale": ["a", "b"]}}', r"crop_scale=\('a', 'b'\): use 2 numbers"),
        ('{"lock_image": "yes"}', "lock_image='yes': use true or false"),
    ],
)
def test_json_that_is_no_configuration_is_refused(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        RunConfig.from_json(text)
    assert "\n" not in str(error.value)


def test_json_of_an_older_version_takes_the_defaults_of_what_came_since() -> None:
    record = json.loads(PRESETS["debug"].to_json())
    del record["rank_timeout_seconds"], record["model"]["slot_eps"]
    assert RunConfig.from_json(json.dumps(record)) == PRESETS["debug"]


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


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"text_weights": Path("bert.safetensors")},
            "--text-weights bert.safetensors without --vocab-file: .*vocab.txt",
        ),
        ({"cased": True}, "--cased without --vocab-file"),
        ({"image_tower": "student"}, "--image-tower student without --image-weights"),
        ({"text_tower": "teacher"}, "--text-tower teacher without --text-weights"),
    ],
)
def test_a_vocabulary_and_a_tower_need_their_file(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        dataclasses.replace(PRESETS["debug"], **changes)
    assert "\n" not in str(error.value)
    dataclasses.replace(
        PRESETS["debug"],
        **{
            "image_weights": Path("vit.safetensors"),
            "text_weights": Path("bert.safetensors"),
            "vocab_file": Path("vocab.txt"),
            **changes,
        },
    )
