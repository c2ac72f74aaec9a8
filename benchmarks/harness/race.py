"""A race: several calls in turns, so that whatever else the machine does meets all of them alike.

A call's best time is what the machine can do; the ratio to the first one is the median over rounds of the ratio within
a round, which a slow minute does not move. Both are told: where they disagree the machine was too busy. Beside them
stands the ratio of the processors' time that was used, which other processes hardly move.
"""

import time
from collections.abc import Callable, Mapping
from statistics import median, quantiles
from typing import Any

from benchmarks.harness.goals import Row
from benchmarks.harness.machine import synchronize

LEAST, MOST = 5, 60  # rounds


class Race:
    """`turn` lets every call run once; the first to start goes on by one each time."""

    def __init__(self, calls: Mapping[str, Callable[[], Any]]) -> None:
        self.calls = dict(calls)
        self.times: dict[str, list[float]] = {}
        self.work: dict[str, list[float]] = {}
        """Seconds of all threads of this process."""
        self._turns = 0
        self.forget()

    def turn(self) -> None:
        names = list(self.calls)
        first = self._turns % len(names)
        for name in names[first:] + names[:first]:
            synchronize()
            began, worked = time.perf_counter(), time.process_time()
            self.calls[name]()
            synchronize()
            self.times[name].append(time.perf_counter() - began)
            self.work[name].append(time.process_time() - worked)
        self._turns += 1

    def forget(self) -> None:
        """What was timed so far was a warm-up."""
        self.times = {name: [] for name in self.calls}
        self.work = {name: [] for name in self.calls}

    def rows(self) -> list[Row]:
        """A row a call, the first call's first."""
        first = next(iter(self.times))
        found = []
        for name, times in self.times.items():
            low, _, high = quantiles(times, n=4) if len(times) > 1 else (times[0],) * 3
            found.append(
                {
                    "provider": name,
                    "seconds": median(times),
                    "iqr": high - low,
                    "rounds": len(times),
                    "fastest": min(times),
                    "of_first": _ratio(times, self.times[first]),
                    "of_fastest": min(times) / min(self.times[first]),
                    "of_work": _ratio(self.work[name], self.work[first]),
                }
            )
        return found


def _ratio(own: list[float], others: list[float]) -> float:
    """Median of the ratios within a round; a clock that saw nothing says 1."""
    return median(a / b if b else 1.0 for a, b in zip(own, others, strict=True))


def rounds_for(seconds_a_round: float, seconds: float) -> int:
    """How many rounds fit into `seconds`."""
    return max(LEAST, min(MOST, int(seconds / seconds_a_round)))
