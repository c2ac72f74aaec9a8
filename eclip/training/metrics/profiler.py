"""--profile: what a few steps spend their time on, as a trace for a browser and as a table of operators.

    profile/trace.json.gz    for chrome://tracing or Perfetto, of rank 0
    profile/operators.txt    the operators with the largest time of their own, by shapes

The parts of a step have their names there (spans.py). The first steps are passed over: they compile, choose kernels and
count FLOPs. Another start of the run, a resumed one too, writes both anew.
"""

import os
from pathlib import Path
from types import TracebackType

from torch.profiler import ProfilerActivity, profile, schedule

from eclip.dataloading.system.console import say
from eclip.files import writing
from eclip.parallel.ranks import Ranks

FOLDER, TRACE, TABLE = "profile", "trace.json.gz", "operators.txt"
PASSED_OVER, WARM_UP, TRACED = 4, 1, 5
"""Steps, in this order; of a run with fewer the last ones are traced."""
_ROWS = 50


class StepProfiler:
    """Around the steps of a run, with a call of `step` after each. Does nothing when off, and on other ranks than 0.

    steps: how many there will be.
    """

    def __init__(self, run_dir: Path, ranks: Ranks, *, on: bool, steps: int) -> None:
        self.folder, self.device = run_dir / FOLDER, ranks.device
        self.passed_over = max(0, min(PASSED_OVER, steps - WARM_UP - TRACED))
        self._profile: profile | None = self._make() if on and ranks.is_main else None
        self._steps = 0
        self.written = False

    def _make(self) -> profile:
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else it prints when it starts and stops
        activities = [ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        return profile(
            activities=activities,
            schedule=schedule(skip_first=self.passed_over, wait=0, warmup=WARM_UP, active=TRACED, repeat=1),
            on_trace_ready=self._write,
            record_shapes=True,
            acc_events=True,
        )

    def __enter__(self) -> "StepProfiler":
        if self._profile is not None:
            self._profile.__enter__()
        return self

    def step(self) -> None:
        """A step has been taken. Raises CannotWrite after the last one that is traced."""
        if self._profile is not None and not self.written:
            self._steps += 1
            self._profile.step()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._profile is None or self.written:
            return
        if kind is None and self._steps > self.passed_over + WARM_UP:  # a short run: what there is
            self._profile.__exit__(None, None, None)
            return
        self._profile.on_trace_ready = None
        self._profile.__exit__(None, None, None)
        if kind is None:
            passed = self.passed_over + WARM_UP
            say(f"--profile: no trace: {self._steps} steps of this start, of which the first {passed} are passed over")

    def _write(self, found: profile) -> None:
        self.written = True
        clock = "self_cuda_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
        table = found.key_averages(group_by_input_shape=True).table(sort_by=clock, row_limit=_ROWS)
        first = self.passed_over + WARM_UP + 1
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            found.export_chrome_trace(str(self.folder / TRACE))
            (self.folder / TABLE).write_text(table, encoding="utf-8")
        say(f"profile of steps {first} to {self._steps} of this start: {self.folder / TABLE}, {self.folder / TRACE}")
