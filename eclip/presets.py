"""Presets: complete configurations as Python constants, and the command line that overrides their values."""

import dataclasses
import io
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from .config import DataConfig, OptimConfig, PresetName, RunConfig
from .model.settings import ModelConfig
from .objectives.settings import ObjectiveConfig
from .parallel.settings import ComputeConfig
from .setting_rules import flag
from .weights.towers import TOWER_SHAPES


def _paper(preset: PresetName, *, width: int, depth: int, heads: int, batch: int) -> RunConfig:
    """The paper's run: 224 px, BERT-base, D=768, T=20, L=6; 15 epochs."""
    return RunConfig(
        preset=preset,
        run_dir=Path("runs") / preset,
        epochs=15,
        global_batch_size=batch,
        checkpoint_every=1000,
        model=ModelConfig(
            image_size=224,
            patch_size=16,
            vision_width=width,
            vision_depth=depth,
            vision_heads=heads,
            vocab_size=30522,
            text_width=768,
            text_depth=12,
            text_heads=12,
            max_positions=512,
            embed_dim=768,
            num_queries=20,
            decoder_depth=6,
            decoder_heads=12,
        ),
        data=DataConfig(data_dir=Path("data/products"), num_workers=8),
        optim=OptimConfig(learning_rate=1e-4, warmup_steps=2000),
    )


_WORKERS = max(1, min(8, len(os.sched_getaffinity(0)) - 1))  # one core is the training process's
_PAPER_B = _paper("vit_b16", width=768, depth=12, heads=12, batch=4096)
# Chosen on the val split of the embedded catalogue (benchmarks/results/what_made_it_learn.md).
_TOWERS_OBJECTIVE = ObjectiveConfig(
    inter_weight=2.0,
    intra_weight=0.5,
    entropy_weight=0.1,
    image_prompt_share=0.6,
    own_image_share=1.0,
    gaussian_share=0.5,
    ema_momentum=0.99,
)
_TOWERS_MODEL = ModelConfig(
    image_size=168, embed_dim=384, num_queries=8, decoder_depth=2, decoder_heads=12, **TOWER_SHAPES
)

PRESETS: dict[PresetName, RunConfig] = {
    # From scratch on the embedded catalogue.
    "demo": RunConfig(
        steps=600,  # 15 minutes on two cores
        model=ModelConfig(decoder_depth=3, decoder_heads=6, num_queries=8),
        optim=OptimConfig(learning_rate=5e-4),
    ),
    # The embedded catalogue with pretrained, locked towers (ViT-S/14, MiniLM-L6) whose image features are cached.
    "demo_towers": RunConfig(
        preset="demo_towers",
        run_dir=Path("runs/demo_towers"),
        image_weights=Path("towers/image.safetensors"),
        text_weights=Path("towers/text.safetensors"),
        vocab_file=Path("towers/vocab.txt"),
        lock_image=True,
        lock_text=True,
        cache_features=True,
        model=_TOWERS_MODEL,
        steps=600,
        cached_views=2,
        objective=_TOWERS_OBJECTIVE,
        optim=OptimConfig(learning_rate=5e-4, warmup_steps=30),
    ),
    # A shop's catalogue on a small machine: a trained ECLIP goes on learning, its towers locked and cached.
    "shop": RunConfig(
        preset="shop",
        run_dir=Path("runs/shop"),
        start_from=Path("runs/demo_towers"),
        fit_batch=256,
        fit_steps=True,
        fit_warmup=True,
        lock_image=True,
        lock_text=True,
        cache_features=True,
        cached_views=2,
        model=_TOWERS_MODEL,  # until the run that it starts from says otherwise
        data=DataConfig(data_dir=Path("data/shop"), num_workers=_WORKERS),
        objective=_TOWERS_OBJECTIVE,
        optim=OptimConfig(learning_rate=2e-4),
    ),
    # The same on one GPU of 24 GB or more, towers and all: ECLIP-B from --image-weights and --text-weights, or another
    # ECLIP from --start-from. Micro-batches keep the memory that of 64 products.
    "shop_gpu": dataclasses.replace(
        _PAPER_B,
        preset="shop_gpu",
        run_dir=Path("runs/shop_gpu"),
        epochs=None,
        fit_batch=4096,
        fit_steps=True,
        fit_warmup=True,
        micro_batch=64,
        checkpoint_every=200,
        data=DataConfig(data_dir=Path("data/shop"), num_workers=_WORKERS),
        optim=OptimConfig(learning_rate=2e-4, tower_learning_rate_scale=0.1),
    ),
    # ECLIP-B and ECLIP-L of the paper; start them from ImageNet and BERT with --image-weights and --text-weights.
    "vit_b16": _PAPER_B,
    "vit_l16": _paper("vit_l16", width=1024, depth=24, heads=16, batch=3072),
    # Seconds on a CPU: that everything runs, not that anything is learnt. See DISPOSABLE_RUNS.
    "debug": RunConfig(
        preset="debug",
        run_dir=Path("runs/debug"),
        steps=5,
        global_batch_size=8,
        checkpoint_every=5,
        log_every=1,
        model=ModelConfig(
            image_size=32,
            patch_size=8,
            vision_width=32,
            vision_depth=1,
            vision_heads=2,
            vocab_size=512,
            text_width=32,
            text_depth=1,
            text_heads=2,
            embed_dim=32,
            num_queries=4,
            decoder_depth=1,
            decoder_heads=2,
        ),
        data=DataConfig(
            data_dir=Path("data/debug"), demo_image_size=48, demo_images_per_product=6, demo_products=40, num_workers=0
        ),
        optim=OptimConfig(learning_rate=1e-3, warmup_steps=2),
    ),
}


DISPOSABLE_RUNS = (PRESETS["debug"].run_dir,)
"""Run folders whose earlier run is replaced without --overwrite: those of presets that train nothing worth keeping."""
_RULE = re.compile("───|---")
_SETTINGS = (RunConfig, ModelConfig, DataConfig, ObjectiveConfig, OptimConfig, ComputeConfig)


def parse(argv: Sequence[str] | None = None, *, prog: str = "python -m eclip.train") -> RunConfig:
    """Read flags (default: sys.argv) over the preset they name (default: demo).

    Flags are flat: `--global-batch-size 128 --objective clip --image-weights vit.safetensors`. Raises SystemExit: 0 for
    --help, 2 after one line on stderr that names an unknown flag or a value that breaks a rule.
    """
    import tyro  # here, so that a finished run opens where tyro is not installed

    arguments = list(sys.argv[1:] if argv is None else argv)
    with one_line_errors():
        _check_values(arguments)
        config, unknown = tyro.cli(
            RunConfig,
            prog=prog,
            description="Train ECLIP. --preset is read first, every other flag overrides its value; with --help it "
            "shows that preset's.",
            args=arguments,
            default=_defaults(arguments),
            config=(tyro.conf.OmitArgPrefixes,),
            return_unknown_args=True,
        )
        if unknown:
            raise ValueError(_unknown(unknown[0], arguments, prog))
        _check_pairs(arguments)
    return config


@contextmanager
def one_line_errors() -> Iterator[None]:
    """tyro draws a box around what is wrong; a log of many ranks wants a line."""
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            yield
    except ValueError as error:
        message = str(error)
    except SystemExit as stop:
        if not stop.code:
            raise
        message = _unboxed(said.getvalue())
    else:
        sys.stderr.write(said.getvalue())
        return
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2) from None


def _unboxed(text: str) -> str:
    """What is wrong, of all that tyro says: the first paragraph inside its box."""
    boxed = [row for row in text.splitlines() if row.startswith("│")]
    rows = [row.strip("│ ") for row in boxed or text.splitlines()]
    if not boxed:  # where the terminal is not UTF-8, a title and a rule stand before it
        rows = rows[next((i + 1 for i, row in enumerate(rows) if _RULE.match(row)), 0) :]
    end = next((i for i, row in enumerate(rows) if _RULE.match(row)), len(rows))
    message = re.sub(r"^Error parsing [\w.]+: ", "", " ".join(rows[:end])) or " ".join(text.split())
    for told, kind in ((r"invalid literal for int\(\) with base 10", "whole number"), ("could not .* float", "number")):
        message = re.sub(rf"^Error parsing (--[\w-]+): {told}: '(.*)'$", rf"\1 \2: use a {kind}", message)
    return message


def _check_values(arguments: Sequence[str]) -> None:
    """Raise ValueError for an empty value, of which a path would be the current folder, and a switch with a value."""
    for before, argument in zip(["", *arguments], arguments, strict=False):
        name, equals, value = argument.partition("=")
        if not argument or (equals and not value and name.startswith("--")):
            given = name if equals else before
            raise ValueError(f"{given or 'an argument'}: its value is empty (a variable of the shell that is not set?)")
        if equals and name.replace("_", "-") in _switches():
            raise ValueError(_takes_no_value(name, value))


def _switches() -> set[str]:
    """The flags without a value: --resume and --no-resume."""
    switches = [flag(field.name) for kind in _SETTINGS for field in dataclasses.fields(kind) if field.type is bool]
    return {*switches, *map(_opposite, switches)}


def _takes_no_value(switch: str, value: str) -> str:
    return f"{switch} {value}: {switch} takes no value; {_opposite(switch)} says the opposite"


def _opposite(switch: str) -> str:
    return switch.replace("--no-", "--") if switch.startswith("--no-") else switch.replace("--", "--no-", 1)


def _unknown(argument: str, arguments: Sequence[str], prog: str) -> str:
    """An argument that is no setting, and the flags that look like it."""
    if not argument.startswith("-"):
        before = arguments[max(0, arguments.index(argument) - 1)]
        if before in _switches():
            return _takes_no_value(before, argument)
        return f"{argument}: no flag stands before it; {prog} --help lists them"
    name = argument.lstrip("-").partition("=")[0].replace("_", "-")
    known = [field.name.replace("_", "-") for kind in _SETTINGS for field in dataclasses.fields(kind)]
    near = [setting for setting in known if name in setting] or get_close_matches(name, known)
    if name == "device":
        return "--device: no such flag: training takes the GPUs it finds (CUDA_VISIBLE_DEVICES chooses), else the CPU"
    hint = f"did you mean {' or '.join(map(flag, near[:3]))}? " if near else ""
    return f"--{name}: no such flag; {hint}{prog} --help lists them"


def _defaults(arguments: Sequence[str]) -> RunConfig:
    """What flags are read over: the preset, without what a given flag stands for, with the model it starts from."""
    name: Any = _value(arguments, "preset")
    preset = PRESETS[name if name in PRESETS else "demo"]  # tyro's message on an unknown one lists the choices
    changes: dict[str, Any] = {}
    if {"steps", "epochs"} & _given(arguments):
        changes |= {"epochs": None, "fit_steps": False}
    if {"global_batch_size", "batch_schedule"} & _given(arguments):
        changes |= {"fit_batch": 0}
    if "warmup_steps" in _given(arguments):
        changes |= {"fit_warmup": False}
    if "start_from" in _given(arguments):
        towers = ("image_weights", "text_weights", "image_tower", "text_tower", "vocab_file")
        changes |= dict.fromkeys(towers)
    config = dataclasses.replace(preset, **changes, **_started(arguments, preset))
    return dataclasses.replace(config, **_told(arguments, config))


def _told(arguments: Sequence[str], config: RunConfig) -> dict[str, Any]:
    """Model and length of texts that a CLIP's or SigLIP's files tell; of other files, and of none, nothing."""
    files, begun = [], None
    for side, default in (("image", config.image_weights), ("text", config.text_weights)):
        path = _value(arguments, f"{side}_weights") or default
        files.append(None if path is None else (Path(path), _value(arguments, f"{side}_tower")))
    if files == [None, None]:
        return {}
    from .weights.flags import told_settings

    if "resume" in _given(arguments):
        with suppress(OSError, ValueError):
            own = Path(_value(arguments, "run_dir") or config.run_dir) / "config.json"
            begun = RunConfig.from_json(own.read_text(encoding="utf-8-sig")).model
    settings = told_settings(files[0], files[1], _given(arguments), config.model, begun)
    model = dataclasses.replace(config.model, **settings)
    padded = model.text_architecture == "siglip" and "max_positions" in settings
    longest = model.max_positions if padded else min(config.data.max_tokens, model.max_positions)
    return {"model": model, "data": dataclasses.replace(config.data, max_tokens=longest)} if settings else {}


def _started(arguments: Sequence[str], preset: RunConfig) -> dict[str, Any]:
    """Model and length of texts of what is started from; nothing where that is none, or unreadable: prepare says so.

    A run that has begun has them too, and is not in need of the other one any more.
    """
    given = _value(arguments, "start_from")
    start = preset.start_from if given is None else Path(given)
    if start is None or given == "None":
        return {}
    from .weights.exported import is_exported, read_facts  # here: torch takes seconds

    own = Path(_value(arguments, "run_dir") or preset.run_dir)
    for folder in (own, start) if "resume" in _given(arguments) else (start, own):
        with suppress(OSError, ValueError):
            text = (folder / "config.json").read_text(encoding="utf-8-sig")
            facts: Any = read_facts(folder) if is_exported(folder) else RunConfig.from_json(text)
            longest = facts.max_tokens if is_exported(folder) else facts.data.max_tokens
            data = dataclasses.replace(preset.data, max_tokens=longest)
            return {"model": dataclasses.replace(facts.model, kernels=preset.model.kernels), "data": data}
    return {}


def _check_pairs(arguments: Sequence[str]) -> None:
    """Raise ValueError for two flags of which one says what the other computes."""
    pairs = (
        ("steps", "epochs"),
        ("steps", "fit_steps"),
        ("warmup_steps", "fit_warmup"),
        ("global_batch_size", "batch_schedule"),
        ("global_batch_size", "fit_batch"),
    )
    for one, other in pairs:
        if {one, other} <= _given(arguments):
            raise ValueError(f"{flag(one)} and {flag(other)}: one is computed from the other; give one of them")


def _given(arguments: Sequence[str]) -> set[str]:
    """The settings whose flag stands there."""
    return {a.removeprefix("--").partition("=")[0].replace("-", "_") for a in arguments if a.startswith("--")}


def _value(arguments: Sequence[str], name: str) -> str | None:
    """The value of a flag, the last one; None when it is not there."""
    found = None
    for position, argument in enumerate(arguments):
        before, equals, value = argument.partition("=")
        if before.replace("_", "-") == flag(name):
            found = value if equals else next(iter(arguments[position + 1 :]), None)
    return found
