"""What may change when a run is resumed: every setting is in one of four classes, by its dotted name.

The meaning of a run's weights must stay: what the model is, what it was trained for and on, in which order. How fast it
learns, how long, and how the work is done may change, and is said. What is said of batch sizes holds by step: steps
that are done must have had these, later ones may get others. The rest says where things are.
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
    | {"seed", "fit_batch", "lock_image", "lock_text", "unlock_last", "cased", "data.max_tokens"}
    # What the embedded catalogue is composed with: other values would pack it again under the run.
    | {"data.demo_image_size", "data.demo_images_per_product", "data.demo_products"}
)
MAY_CHANGE = _all("optim", OptimConfig) | _all("compute", ComputeConfig) | {
    "preset", "steps", "epochs", "fit_steps", "fit_warmup", "micro_batch", "bf16", "max_nonfinite_steps",
    "checkpoint_every", "keep_checkpoints", "async_checkpoints", "validate_every", "evaluate",
    "log_every", "tensorboard", "wandb", "profile",
    "cache_features", "cached_views", "rank_timeout_seconds", "model.kernels",
    "data.data_dir", "data.decoder", "data.num_workers", "data.stall_seconds", "data.crop_scale",
    "data.flip",
}  # fmt: skip
BY_STEP = frozenset({"global_batch_size", "batch_schedule"})
"""The schedule of the global batch: `require_same_batches`."""
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


def require_same_batches(saved: RunConfig, config: RunConfig, step: int) -> None:
    """Raise ValueError unless `config` gives the first `step` steps the batch sizes that they were taken with.

    The order of the products would be another one. A constant schedule and --global-batch-size are the same.
    """
    old, new = saved.schedule.until(step), config.schedule.until(step)
    if old != new:
        constant = len(old.entries) == len(new.entries) == 1 and config.batch_schedule is None
        name = "global_batch_size" if constant else "batch_schedule"
        was, is_now = (old.largest, new.largest) if constant else (str(old), str(new))
        raise ValueError(
            f"{config.run_dir}: --resume with another {name} (the run has {was}, the flags give {is_now}) for the "
            f"{step} steps that are done; keep these sizes, from step {step} on --batch-schedule may give others"
        )


def describe_changes(saved: RunConfig, config: RunConfig) -> str | None:
    """One line about the settings that changed and may, or None."""
    changed = [f"{name} {old} -> {new}" for name, old, new in _changes(saved, config, MAY_CHANGE)]
    if saved.schedule != config.schedule:
        changed.append(f"batch_schedule {saved.schedule} -> {config.schedule}")
    return f"resumed with changed settings: {', '.join(changed)}" if changed else None


def _changes(saved: RunConfig, config: RunConfig, names: frozenset[str]) -> Iterator[tuple[str, Any, Any]]:
    """Name of the flag, old and new value of each of `names` that differs."""
    old, new = flatten(saved), flatten(config)
    for name in new:
        if name in names and old[name] != new[name]:
            yield name.rpartition(".")[2], old[name], new[name]
