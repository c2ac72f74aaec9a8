"""How large the global batch of each step is: constant, or growing in steps (e-CLIP's batch size scheduler).

A schedule is a list of (first step, size), written `0:1024,2000:4096`. Everything about it is a pure function of the
step: a resumed run needs the schedule and the step, no state.
"""

import math
from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class BatchSchedule:
    """Global batch sizes by step; `entries` are (first step, size), the first step of the first one is 0."""

    entries: tuple[tuple[int, int], ...]

    @classmethod
    def constant(cls, size: int) -> "BatchSchedule":
        """The same size at every step."""
        return cls(((0, size),))

    @classmethod
    def parse(cls, text: str) -> "BatchSchedule":
        """Read `0:1024,2000:4096`. Raises ValueError that quotes what breaks the form."""
        example = "write step:size pairs, e.g. 0:1024,2000:4096"
        entries = []
        for pair in text.split(","):
            first, colon, size = pair.partition(":")
            if not colon or not first.strip().isdecimal() or not size.strip().isdecimal():
                raise ValueError(f"batch schedule {text!r}: {pair.strip()!r} is no step:size; {example}")
            entries.append((int(first), int(size)))
        if entries[0][0] != 0:
            raise ValueError(f"batch schedule {text!r}: it begins at step {entries[0][0]}, not 0; {example}")
        for (before, _), (step, _) in pairwise(entries):
            if step <= before:
                raise ValueError(f"batch schedule {text!r}: step {step} follows step {before}; {example}")
        if small := [products for _, products in entries if products < 2]:
            raise ValueError(
                f"batch schedule {text!r}: size {small[0]}, contrast needs two products or more; {example}"
            )
        return cls(tuple(entries))

    def __str__(self) -> str:
        return ",".join(f"{step}:{size}" for step, size in self.entries)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sizes in order, each once for every entry."""
        return tuple(size for _, size in self.entries)

    @property
    def largest(self) -> int:
        """The largest size of any step."""
        return max(self.sizes)

    def size(self, step: int) -> int:
        """Products of a step, over all ranks."""
        return self.entries[self._entry(step)][1]

    def position(self, step: int) -> int:
        """Products that the steps before `step` took: where its own begin in the endless stream of products."""
        last = self._entry(step)
        whole = sum(size * (after - first) for (first, size), (after, _) in pairwise(self.entries[: last + 1]))
        first, size = self.entries[last]
        return whole + (step - first) * size

    def steps(self, products: int) -> int:
        """Steps that take `products` or more of the stream, one at least."""
        for (first, size), (after, _) in pairwise([*self.entries, (-1, 0)]):
            begun = self.position(first)
            needed = first + math.ceil((products - begun) / size)
            if after < 0 or needed <= after:
                return max(1, needed)
        raise AssertionError

    def until(self, step: int) -> "BatchSchedule":
        """The part of the schedule that steps before `step` were taken with: what a resumed run must keep.

        Entries that change nothing are left out: what took the same steps is equal.
        """
        past = [entry for entry in self.entries if entry[0] < max(1, step)]
        return BatchSchedule(tuple(e for before, e in pairwise([(0, 0), *past]) if e[1] != before[1]))

    def _entry(self, step: int) -> int:
        return bisect_right(self.entries, step, key=lambda entry: entry[0]) - 1
