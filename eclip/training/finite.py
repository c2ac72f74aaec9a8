"""A step whose loss or gradient is not a number is skipped, on the device; here it is counted, and its images kept.

One bad step of a million must not end a run: the weights stay as they were, and the keys of its images go to a file,
for a resumed run meets the same batch again. Many in a row mean that the run has diverged: it ends.
"""

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from eclip.dataloading.system.console import say
from eclip.parallel.ranks import Ranks
from eclip.parallel.watch import PeerFailed
from eclip.training.flight import Record
from eclip.training.metrics.gradients import is_of_part, to_norms


class NonFiniteLoss(RuntimeError):
    """Losses or gradient norms are NaN or infinite, step after step. The weights are those before the first of them."""


class SkippedSteps:
    """Counts the steps whose numbers are not finite; every rank sees the same ones.

    limit: how many in a row are skipped before the run ends.
    """

    def __init__(self, limit: int, run_dir: Path, ranks: Ranks) -> None:
        self.limit, self.run_dir, self.ranks = limit, run_dir, ranks
        self.total = self.in_a_row = 0

    def state_dict(self) -> dict[str, int]:
        """For the checkpoint, so that a resumed run counts on."""
        return {"total": self.total, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Count on; `state` is empty in checkpoints that know of no skipped steps."""
        self.total, self.in_a_row = state.get("total", 0), state.get("in_a_row", 0)

    def see(self, record: Record) -> bool:
        """Whether a step was taken.

        If not, every rank writes its losses and images to run_dir/nonfinite_step{N}_rank{R}.json. Past the limit the
        first rank whose own losses are not finite raises NonFiniteLoss (rank 0 when only gradients are at fault: they
        are the same on all), the others PeerFailed.
        """
        if record.finite:
            self.in_a_row = 0
            return True
        self.total += 1
        self.in_a_row += 1
        path = self.run_dir / f"nonfinite_step{record.step}_rank{self.ranks.rank}.json"
        self._write(path, record)
        if self.in_a_row > self.limit:
            self._end(path, record)
        if self.ranks.is_main:
            again = f"{self.in_a_row} in a row; " if self.in_a_row > 1 else ""
            say(f"step {record.step}: {_numbers(record)}: skipped ({again}its images are in {path})")
        return False

    def _write(self, path: Path, record: Record) -> None:
        report = {
            "step": record.step,
            "mean": _as_json(to_norms(record.means)),
            "rank": _as_json(_own_losses(record)),
            "keys": list(record.keys),
        }
        with suppress(OSError):  # a full disk must not hide what happened
            path.write_text(json.dumps(report, indent=1, allow_nan=False), encoding="utf-8")

    def _end(self, path: Path, record: Record) -> None:
        bad = self.ranks.gather(not all(math.isfinite(value) for value in _own_losses(record).values()))
        if self.ranks.rank != (bad.index(True) if any(bad) else 0):
            raise PeerFailed(f"step {record.step}: not finite on another rank")
        keys = record.keys
        shown = ", ".join(keys[:8]) + (", ..." if len(keys) > 8 else "")
        row = f"the {self.in_a_row} steps up to it were not finite either and " if self.in_a_row > 1 else "it "
        raise NonFiniteLoss(
            f"step {record.step}: {_numbers(record)}. Images of rank {self.ranks.rank}: {shown} ({len(keys)} in "
            f"{path}). {row[0].upper()}{row[1:]}changed no weight (--max-nonfinite-steps {self.limit}), and the newest "
            f"checkpoint is whole; lower --learning-rate or --clip-norm, or use --no-bf16"
        )


def _numbers(record: Record) -> str:
    return ", ".join(f"{name} {value:.6g}" for name, value in record.means.items() if not is_of_part(name))


def _own_losses(record: Record) -> dict[str, float]:
    """Gradients are averaged by then: one bad rank is the end of every rank's norm."""
    return {name: value for name, value in record.own.items() if name != "grad_norm" and not is_of_part(name)}


def _as_json(numbers: Mapping[str, float]) -> dict[str, float | str]:
    """JSON has no NaN and no infinity: they become "nan", "inf" and "-inf"."""
    return {name: value if math.isfinite(value) else str(value) for name, value in numbers.items()}
