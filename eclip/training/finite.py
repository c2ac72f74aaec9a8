"""A loss that is not a number ends the run before the step is taken, with the images that may have caused it."""

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from eclip.dataloading.schema import Batch
from eclip.parallel.ranks import Ranks
from eclip.parallel.watch import PeerFailed


class NonFiniteLoss(RuntimeError):
    """A loss or the gradient norm is NaN or infinite. The weights are still those before the step."""


def require_finite(
    values: Mapping[str, float], losses: Mapping[str, Tensor], batch: Batch, run_dir: Path, ranks: Ranks
) -> None:
    """Raise when one of `values`, means over ranks, is not finite; `losses` are this rank's own.

    Every rank writes its losses and images to run_dir/nonfinite_step{N}_rank{R}.json. The first whose own losses are
    not finite raises NonFiniteLoss (rank 0 when only gradients are at fault: they are the same on all), the others
    PeerFailed.
    """
    if all(math.isfinite(value) for value in values.values()):
        return
    path = run_dir / f"nonfinite_step{batch.step}_rank{ranks.rank}.json"
    own = {name: float(loss.detach()) for name, loss in losses.items()}
    report = {"step": batch.step, "mean": _as_json(values), "rank": _as_json(own), "keys": batch.keys}
    with suppress(OSError):  # a full disk must not hide why the run ends
        path.write_text(json.dumps(report, indent=1, allow_nan=False))
    bad = ranks.gather(not all(math.isfinite(value) for value in own.values()))
    if ranks.rank != (bad.index(True) if any(bad) else 0):
        raise PeerFailed(f"step {batch.step}: not finite on another rank")
    numbers = ", ".join(f"{name} {value:.6g}" for name, value in values.items())
    shown = ", ".join(batch.keys[:8]) + (", ..." if len(batch.keys) > 8 else "")
    raise NonFiniteLoss(
        f"step {batch.step}: {numbers}. Images of rank {ranks.rank}: {shown} ({len(batch.keys)} in {path}). "
        f"The newest checkpoint is from before; lower --learning-rate or --clip-norm, or use --no-bf16"
    )


def _as_json(numbers: Mapping[str, float]) -> dict[str, float | str]:
    """JSON has no NaN and no infinity: they become "nan", "inf" and "-inf"."""
    return {name: value if math.isfinite(value) else str(value) for name, value in numbers.items()}
