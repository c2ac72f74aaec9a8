"""The division of steps into parts: every row once, numbers that lead back, sizes that must divide."""

import pytest

from eclip.dataloading.parts import Parts
from eclip.dataloading.schedule import BatchSchedule


@pytest.mark.parametrize("text", ["0:8", "0:4,3:8,5:16", "0:16,2:4"])
@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, None), (1, 1), (1, 4), (2, None), (2, 2), (4, 1)])
def test_every_row_of_a_step_is_in_one_part(text: str, world_size: int, micro_batch: int | None) -> None:
    schedule = BatchSchedule.parse(text)
    ranks = [Parts(schedule, rank, world_size, micro_batch) for rank in range(world_size)]
    number = 0
    for step in range(9):
        count, rows = ranks[0].count(step), ranks[0].rows(step)
        held = [list(parts.positions(step, part)) for parts in ranks for part in range(count)]
        assert [row for part in held for row in part] == list(range(schedule.size(step)))
        assert {len(part) for part in held} == {rows} and rows <= ranks[0].most_rows
        assert count == 1 if micro_batch is None else rows == micro_batch
        assert ranks[-1].before(step) == number
        for part in range(count):
            assert ranks[-1].place(number) == (step, part)
            number += 1
    assert ranks[0].most_rows == max(ranks[0].rows(step) for step in range(9))


def test_names() -> None:
    assert Parts(BatchSchedule.constant(8)).name(3) == "step 3"
    grown = Parts(BatchSchedule.parse("0:4,1:8"), micro_batch=4)
    assert [grown.name(i) for i in range(3)] == ["step 0", "step 1, part 1 of 2", "step 1, part 2 of 2"]


@pytest.mark.parametrize(
    ("text", "changes", "words"),
    [
        ("0:5", {"world_size": 2}, r"^global_batch_size=5 .*2 ranks; set --global-batch-size .* 2, here 4 or 6$"),
        ("0:3", {"world_size": 4}, "a multiple of 4, here 4$"),
        ("0:96", {"micro_batch": 64}, "over 1 rank x micro_batch=64; .* of 64, here 64 or 128, or .*--micro-batch$"),
        (
            "0:1024,2000:4100", {"world_size": 8, "micro_batch": 64},
            "^batch schedule 0:1024,2000:4100: 2000:4100 does not divide over 8 ranks x micro_batch=64; set the size "
            "from step 2000 on in --batch-schedule to a multiple of 512, here 4096 or 4608, or",
        ),
        ("0:8", {"micro_batch": 0}, "micro_batch=0: set --micro-batch to 1 or more"),
        ("0:8", {"rank": 1}, "rank=1 of world_size=1"),
    ],
)  # fmt: skip
def test_what_does_not_divide_is_refused(text: str, changes: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        Parts(BatchSchedule.parse(text), **changes)
    assert "\n" not in str(error.value)


def test_nothing_to_divide() -> None:
    with pytest.raises(ValueError, match="global_batch_size=0"):
        Parts(BatchSchedule.constant(0))
