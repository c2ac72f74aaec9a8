"""What may change when a run is resumed: every setting is in one of three classes, by its dotted name.

The meaning of a run's weights must stay: what the model is, what it was trained for and on, in which order. How fast it
learns, how long, and how the work is done may change, and is said. The rest says where things are.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from eclip.config import OptimConfig, RunConfig
from eclip.model.settings import ModelConfig
from eclip.objectives.settings import ObjectiveConfig
from eclip.parallel.settings import ComputeConfig


def _all(prefix: str, kind: Any, *but: str) -> frozenset[str]:
    return frozenset(f"{prefix}.{f.name}" for f in dataclasses.fields(kind) if f.name not in but)


MUST_BE_EQUAL = (
    _all("model", ModelConfig, "vocab_size", "kernels")
    | _all("objective", ObjectiveConfig)
    | {"seed", "global_batch_size", "fit_batch", "lock_image", "lock_text", "unlock_last", "cased", "data.max_tokens"}
    # What the embedded catalogue is composed with: other values would pack it again under the run.
    | {"data.demo_image_size", "data.demo_images_per_product", "data.demo_products"}
)
MAY_CHANGE = _all("optim", OptimConfig) | _all("compute", ComputeConfig) | {
    "preset", "steps", "epochs", "fit_steps", "fit_warmup", "checkpoint_every", "keep_checkpoints", "log_every", "tensorboard", "wandb",
    "evaluate", "bf16", "batch_schedule", "micro_batch", "validate_every", "async_checkpoints", "max_nonfinite_steps",
    "profile",
    "cache_features", "cached_views", "rank_timeout_seconds", "model.kernels",
    "data.data_dir", "data.decoder", "data.num_workers", "data.stall_seconds", "data.crop_scale",
    "data.flip",
}  # fmt: skip
NO_MATTER = frozenset({
    "run_dir", "resume", "overwrite", "start_from",
    # The weights and the vocabulary are those of the run folder; a --vocab-file is compared with it by content.
    "image_weights", "text_weights", "image_tower", "text_tower", "vocab_file", "model.vocab_size",
})  # fmt: skip


def flatten(config: RunConfig) -> dict[str, Any]:
    """Every setting by its dotted name."""
    return dict(_items(dataclasses.asdict(config), ""))


def _items(record: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in record.items():
        if isinstance(value, dict):
            yield from _items(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def require_same_run(saved: RunConfig, config: RunConfig) -> None:
    """Raise ValueError naming each setting that a resumed run must keep and that `config` has otherwise."""
    changed = [
        f"another {name} (the run has {old}, the flags give {new})"
        for name, old, new in _changes(saved, config, MUST_BE_EQUAL)
    ]
    if changed:
        raise ValueError(
            f"{config.run_dir}: --resume with {', '.join(changed)}; use the settings of the first start or another "
            f"--run-dir"
        )


def describe_changes(saved: RunConfig, config: RunConfig) -> str | None:
    """One line about the settings that changed and may, or None."""
    changed = [f"{name} {old} -> {new}" for name, old, new in _changes(saved, config, MAY_CHANGE)]
    return f"resumed with changed settings: {', '.join(changed)}" if changed else None


def _changes(saved: RunConfig, config: RunConfig, names: frozenset[str]) -> Iterator[tuple[str, Any, Any]]:
    """Name of the flag, old and new value of each of `names` that differs."""
    old, new = flatten(saved), flatten(config)
    for name in new:
        if name in names and old[name] != new[name]:
            yield name.rpartition(".")[2], old[name], new[name]
