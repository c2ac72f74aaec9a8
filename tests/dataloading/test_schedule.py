"""Sizes of the global batch by step: read, counted and cut."""

import pytest

from eclip.dataloading.schedule import BatchSchedule


def test_reads_and_writes_itself() -> None:
    for text in ("0:1024,2000:4096", "0:2", "0:8,1:4,2:16"):
        assert str(BatchSchedule.parse(text)) == text
    assert BatchSchedule.parse(" 0:4, 3:8 ") == BatchSchedule(((0, 4), (3, 8)))


@pytest.mark.parametrize(
    ("text", "quoted"),
    [
        ("1024", "'1024' is no step:size"),
        ("", "'' is no step:size"),
        ("0:8,", "'' is no step:size"),
        ("0:8,x:16", "'x:16' is no step:size"),
        ("0:8,4:-16", "'4:-16' is no step:size"),
        ("5:8", "begins at step 5"),
        ("0:8,4:16,4:32", "step 4 follows step 4"),
        ("0:8,4:16,2:32", "step 2 follows step 4"),
        ("0:8,4:1", "size 1"),
    ],
)
def test_says_what_it_cannot_read(text: str, quoted: str) -> None:
    with pytest.raises(ValueError, match="batch schedule") as error:
        BatchSchedule.parse(text)
    assert quoted in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["0:4", "0:4,3:8,5:16", "0:7,1:3,9:5"])
def test_positions_add_up(text: str) -> None:
    schedule, begun = BatchSchedule.parse(text), 0
    for step in range(30):
        assert schedule.position(step) == begun
        begun += schedule.size(step)


@pytest.mark.parametrize("text", ["0:4", "0:4,3:8,5:16", "0:7,1:3,9:5"])
@pytest.mark.parametrize("products", [1, 4, 5, 12, 13, 20, 28, 29, 1000])
def test_steps_are_the_fewest_that_take_so_many(text: str, products: int) -> None:
    schedule = BatchSchedule.parse(text)
    steps = schedule.steps(products)
    assert schedule.position(steps) >= products
    assert steps == 1 or schedule.position(steps - 1) < products


def test_what_was_trained_with_is_kept() -> None:
    schedule = BatchSchedule.parse("0:4,3:8,5:16")
    assert str(schedule.until(0)) == "0:4"
    assert str(schedule.until(3)) == "0:4"  # step 3, the first of size 8, has not been taken
    assert str(schedule.until(4)) == "0:4,3:8"
    assert BatchSchedule.parse("0:4,2:4,3:8,4:8").until(9) == schedule.until(5)  # the same sizes, said otherwise
    assert schedule.largest == 16
