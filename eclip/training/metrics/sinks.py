"""Where the numbers of a run go: a console line, metrics.jsonl, and TensorBoard or Weights & Biases when asked for.

A sink is a function of (steps done, numbers); a run has a list of them, called on rank 0 only.
"""

import importlib.util
import json
from collections.abc import Callable, Mapping
from pathlib import Path

from eclip.config import RunConfig
from eclip.dataloading.system.console import say
from eclip.files import append_line, replace_text, writing

MetricSink = Callable[[int, Mapping[str, float]], None]


def console_sink(total_steps: int) -> MetricSink:
    """Print `step 120/20000 | loss 2.134 (itc 1.021 intra 0.310) | scale 14.3 | grad 0.41 | lr 4.9e-4 | ...`.

    The terms of the loss are what stands before it in the numbers (`Objective.in_order`). Gradient norms of the parts
    of the model would double the line: they are in the other sinks.
    """
    parts: list[tuple[str, Callable[[float], str]]] = [
        ("val_loss", lambda v: f"val {v:.3f}"),
        ("logit_scale", lambda v: f"scale {v:.1f}"),
        ("positive_share", lambda v: f"positive {v:.0%}"),
        ("grad_norm", lambda v: f"grad {v:.2f}"),
        ("learning_rate", lambda v: f"lr {format_rate(v)}"),
        ("pairs_per_second", lambda v: f"{format_count(v)} pairs/s"),
        ("mfu", lambda v: f"mfu {v:.0%}"),
        ("data_seconds", lambda v: f"data {v * 1e3:.0f} ms"),
        ("memory_gib", lambda v: f"mem {v:.0f} GiB" if v >= 10 else f"mem {v:.1f} GiB"),
        ("eta_seconds", lambda v: f"eta {format_duration(v)}"),
        ("skipped_steps", lambda v: f"skipped {v:.0f}"),
    ]

    def write(step: int, values: Mapping[str, float]) -> None:
        fields = [text(values[name]) for name, text in parts if name in values]
        say(" | ".join([f"step {step}/{total_steps}", *_loss_field(values), *fields]))

    return write


def _loss_field(values: Mapping[str, float]) -> list[str]:
    if "loss" not in values:
        return []
    names = list(values)
    terms = [f"{name} {values[name]:.3f}" for name in names[: names.index("loss")]]
    return [f"loss {values['loss']:.3f}" + (f" ({' '.join(terms)})" if terms else "")]


def jsonl_sink(path: Path, *, start_step: int = 0) -> MetricSink:
    """One JSON object a line, floats in full: {"step": 10, "loss": ...}.

    Lines of `path` after `start_step` are dropped first: a run that died after its last checkpoint computed them, and
    the resumed one computes them again. Writing raises CannotWrite and leaves no half line.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        found = path.read_bytes()
        kept = b"".join(line + b"\n" for line in found.split(b"\n") if _step_of(line) <= start_step)
        if kept != found:
            replace_text(path, kept.decode())

    def write(step: int, values: Mapping[str, float]) -> None:
        append_line(path, json.dumps({"step": step, **values}))

    return write


def _step_of(line: bytes) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # the half line of a killed run


def tensorboard_sink(log_dir: Path, *, start_step: int = 0) -> MetricSink:
    """Scalars for TensorBoard, which then hides what a dead run logged after `start_step`. Needs that package."""
    from torch.utils.tensorboard import SummaryWriter  # loads 100 modules; few runs want it

    writer = SummaryWriter(str(log_dir), purge_step=start_step + 1 if start_step else None)

    def write(step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return write


def wandb_sink(project: str, config: RunConfig) -> MetricSink:
    """Weights & Biases. Needs the package wandb.

    The run's id stays in run_dir/wandb.json: a resumed run continues there, one that starts anew (the file is deleted
    then) gets its own. W&B drops steps that it has already; a resumed run computes the same numbers for them.
    """
    import wandb

    path = config.run_dir / "wandb.json"
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        known = kept["id"] if kept["project"] == project else None
    except (OSError, ValueError, KeyError, TypeError):
        known = None
    settings = json.loads(config.to_json())
    try:
        run = wandb.init(project=project, name=config.run_dir.name, config=settings, id=known, resume="allow")
    except Exception as error:  # no account, no network: wandb's own errors have no common type over its versions
        reason = " ".join(str(error).split())
        raise ValueError(f"--wandb {project}: {reason}; set WANDB_MODE=offline, or drop the flag") from error
    replace_text(path, json.dumps({"project": project, "id": run.id}) + "\n")
    return lambda step, values: run.log(dict(values), step=step)


def check_packages(config: RunConfig) -> None:
    """Raise ValueError when a sink is asked for whose package is not installed."""
    for wanted, package, flag in (
        (config.tensorboard, "tensorboard", "--tensorboard"),
        (config.wandb is not None, "wandb", "--wandb"),
    ):
        if wanted and importlib.util.find_spec(package) is None:
            raise ValueError(f"{flag} needs the package {package}; run `pip install {package}` or drop the flag")


def build_sinks(config: RunConfig, *, start_step: int = 0) -> list[MetricSink]:
    """Console and metrics.jsonl always, the others when the configuration asks for them."""
    sinks = [console_sink(config.steps), jsonl_sink(config.run_dir / "metrics.jsonl", start_step=start_step)]
    if config.tensorboard:
        sinks.append(tensorboard_sink(config.run_dir / "tensorboard", start_step=start_step))
    if config.wandb is not None:
        sinks.append(wandb_sink(config.wandb, config))
    return sinks


def format_count(value: float) -> str:
    """31234 -> 31.2k, 87 -> 87, 4.25 -> 4.2."""
    if value >= 1000:
        return f"{value / 1000:.1f}k"
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def format_rate(value: float) -> str:
    """4.9e-04 -> 4.9e-4."""
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def format_duration(seconds: float) -> str:
    """3720 -> 1h02m, 200 -> 3m20s, 45 -> 45s."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 60}m{whole % 60:02d}s" if whole >= 60 else f"{whole}s"
