"""In which parts a rank takes its share of every step: the whole at once, or micro-batches.

Rank r of W has rows [r*B, (r+1)*B) of a step's global batch, of W*B. They come as K batches of B/K rows, in order: K is
1, or B divided by the micro-batch. The batches of all steps are numbered through: workers share them out by number.
"""

from bisect import bisect_right
from dataclasses import dataclass

from .schedule import BatchSchedule


@dataclass(frozen=True)
class Parts:
    """The division of every step; micro_batch: rows of a part, None takes a rank's share at once.

    Raises ValueError when a size of the schedule does not divide.
    """

    schedule: BatchSchedule
    rank: int = 0
    world_size: int = 1
    micro_batch: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank={self.rank} of world_size={self.world_size}: ranks count from 0 to world_size - 1")
        if self.micro_batch is not None and self.micro_batch < 1:
            raise ValueError(f"micro_batch={self.micro_batch}: set --micro-batch to 1 or more")
        for step, size in self.schedule.entries:
            if size < 1 or size % self._unit:
                raise ValueError(self._refusal(step, size))

    @property
    def _unit(self) -> int:
        """What every size is a multiple of."""
        return self.world_size * (self.micro_batch or 1)

    def _refusal(self, step: int, size: int) -> str:
        unit = self._unit
        below = size // unit * unit
        nearest = f"{below} or {below + unit}" if below > 1 else f"{below + unit}"
        scheduled = len(self.schedule.entries) > 1
        value = f"batch schedule {self.schedule}: {step}:{size}" if scheduled else f"global_batch_size={size}"
        flag = f"the size from step {step} on in --batch-schedule" if scheduled else "--global-batch-size"
        over, way = f"over {self.world_size} rank{'s' * (self.world_size > 1)}", ""
        if self.micro_batch is not None:
            over, way = f"{over} x micro_batch={self.micro_batch}", ", or choose another --micro-batch"
        return f"{value} does not divide {over}; set {flag} to a multiple of {unit}, here {nearest}{way}"

    def count(self, step: int) -> int:
        """Parts of a step: K."""
        return 1 if self.micro_batch is None else self.schedule.size(step) // self._unit

    def rows(self, step: int) -> int:
        """Products of each part of a step."""
        return self.micro_batch or self.schedule.size(step) // self.world_size

    @property
    def most_rows(self) -> int:
        """Products of the largest part of any step."""
        return self.micro_batch or self.schedule.largest // self.world_size

    def positions(self, step: int, part: int) -> range:
        """Rows of the global batch that a part holds."""
        rows = self.rows(step)
        first = (self.rank * self.count(step) + part) * rows
        return range(first, first + rows)

    def before(self, step: int) -> int:
        """Batches of the steps before `step`: the number of its first one."""
        return step if self.micro_batch is None else self.schedule.position(step) // self._unit

    def place(self, number: int) -> tuple[int, int]:
        """Step and part of a batch by its number."""
        if self.micro_batch is None:
            return number, 0
        entries = self.schedule.entries
        first = entries[bisect_right(entries, number, key=lambda entry: self.before(entry[0])) - 1][0]
        steps, part = divmod(number - self.before(first), self.count(first))
        return first + steps, part

    def name(self, number: int) -> str:
        """A batch by its number, for messages."""
        step, part = self.place(number)
        count = self.count(step)
        return f"step {step}" if count == 1 else f"step {step}, part {part + 1} of {count}"
