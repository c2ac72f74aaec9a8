"""Flags over presets, and the one line that says what is wrong with them."""

import dataclasses
import io
import re
from pathlib import Path

import pytest

from eclip.presets import PRESETS, parse


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


def test_a_given_number_replaces_what_the_preset_computes() -> None:
    assert parse(["--preset", "vit_b16"]).epochs == 15
    assert (given := parse(["--preset", "vit_b16", "--steps", "50"])).epochs is None and given.steps == 50
    shop = parse(["--preset", "shop", "--epochs", "3"])
    assert (shop.epochs, shop.fit_steps, shop.fit_warmup, shop.fit_batch) == (3, False, True, 256)
    assert parse(["--preset", "shop", "--batch-schedule", "0:16,9:32"]).fit_batch == 0
    assert parse(["--preset=shop", "--global-batch-size=32"]).fit_batch == 0
    assert not parse(["--preset", "shop", "--warmup-steps", "7"]).fit_warmup
    assert parse(["--preset", "shop", "--fit-batch", "64"]).fit_batch == 64


def test_help_lists_flags_and_presets(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--help"])
    text = capsys.readouterr().out
    for wanted in ("--global-batch-size", "--soft-labels", "--cache-features", "--epochs", "shop_gpu", "vit_l16"):
        assert wanted in text


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--preset huge", "'huge'.*'demo_towers'"),
        ("--objective gan", "'gan'.*--objective.*'clip'"),
        ("--no-such-flag", "--no-such-flag: no such flag; .*--help"),
        ("--batch-size 0", r"--batch-size: no such flag; did you mean --global-batch-size\? "),
        ("--batch_size=8", "did you mean --global-batch-size"),
        ("--lr 1e-3", "--lr: no such flag"),
        ("--device tpu", "--device: no such flag: training takes the GPUs it finds"),
        ("--max-token 9", "did you mean --max-tokens"),
        ("--depth 3", "--vision-depth or --text-depth or --decoder-depth"),
        ("--flip 3", "--flip 3: --flip takes no value; --no-flip says the opposite"),
        ("--no-flip no", "--no-flip no: --no-flip takes no value; --flip says"),
        ("--overwrite=false", "--overwrite false: --overwrite takes no value; --no-overwrite says"),
        ("--token_norm=1", "takes no value"),
        ("--steps 3 16", "16: no flag stands before it"),
        ("--run-dir=", "--run-dir: its value is empty"),
        ("16", "16: no flag stands before it"),
        ("--steps", "--steps"),
        ("--steps 1e3", "--steps 1e3: use a whole number"),
        ("--learning-rate fast", "--learning-rate fast: use a number"),
        ("--crop-scale 0.5", "--crop-scale.* 2 values"),
        ("--max-tokens 2", r"max_tokens=2: \[CLS\], one piece and \[SEP\] need 3; set --max-tokens to 3 or more"),
        ("--max-tokens 999", "max_tokens=999 exceeds max_positions=64"),
        ("--global-batch-size 0", "global_batch_size=0: .*--global-batch-size to 2 or more"),
        ("--learning-rate nan", "learning_rate=nan: set --learning-rate to a number above 0"),
        ("--vision-heads 0", "vision_heads=0: set --vision-heads to 1 or more"),
        ("--patch-size 0", "patch_size=0"),
        ("--image-size 0", "image_size=0"),
        ("--beta2 1", "beta2=1.0: set --beta2 to a number from 0 and below 1"),
        ("--cache-features", "--cache-features needs --lock-image"),
        ("--steps 5 --epochs 2", "--steps and --epochs: one is computed from the other; give one"),
        ("--epochs=2 --preset vit_b16 --steps=5", "--steps and --epochs"),
        ("--global-batch-size 8 --batch-schedule 0:8", "--global-batch-size and --batch-schedule"),
        ("--preset shop --steps 5 --fit-steps", "--steps and --fit-steps"),
        ("--epochs 0", "epochs=0.0: set --epochs to a number above 0"),
        ("--lr-scaling sqrt", "--lr-scaling sqrt without --batch-schedule"),
    ],
)
def test_wrong_flags_and_values_are_one_line(
    flags: str, words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    with pytest.raises(SystemExit) as stop:
        parse(flags.split())
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(f"error: .*{words}.*\n", err), err


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_a_terminal_of_any_encoding_reads_the_same_line(
    encoding: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    with pytest.raises(SystemExit):
        parse(["--objective", "gan"])
    assert re.fullmatch("error: invalid choice 'gan' for .*'clip'.\n", capsys.readouterr().err.replace(")", ""))


@pytest.mark.parametrize("arguments", [["--run-dir", ""], ["", "--steps", "3"]])
def test_an_unset_variable_of_the_shell_is_no_folder(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(arguments)
    assert "its value is empty" in capsys.readouterr().err
