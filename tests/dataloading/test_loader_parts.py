"""A step in parts and batches of growing size: the rows are those of the unsplit batch, and resume is exact."""

import dataclasses
import itertools
import threading
from collections.abc import Iterator

import pytest
import torch

from eclip.dataloading.errors import DataError
from eclip.dataloading.loader import ProductLoader
from eclip.dataloading.schedule import BatchSchedule
from eclip.dataloading.schema import Batch
from eclip.dataloading.shards import ShardIndex
from eclip.dataloading.text import Tokenizer
from tests.dataloading.fixtures import jpeg, make_split

SIZE = 16
GROWING = BatchSchedule.parse("0:4,2:8,5:16")
PER_ROW = ("images", "image_rows", "product_ids", "catalog_ids", "category_ids", "title_ids")


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return ShardIndex.open(make_split(tmp_path_factory.mktemp("data")), "train")


@pytest.fixture(scope="module")
def tokenizer(index):
    return Tokenizer.train(index.texts(), vocab_size=128)


def loader(index, tokenizer, sizes=GROWING, **changes):
    options = {"image_size": SIZE, "decoder": "torch", "num_workers": 0, "max_tokens": 12}
    return ProductLoader(index, tokenizer, global_batch_size=sizes, **{**options, **changes})


def steps(stream: Iterator[Batch], count: int) -> list[list[Batch]]:
    """The parts of so many steps."""
    found: list[list[Batch]] = []
    for batch in stream:
        if batch.part == 0:
            found.append([])
        found[-1].append(batch)
        if len(found) == count and batch.part == batch.parts - 1:
            break
    return found


def view(batch: Batch, which: int) -> tuple[list[int], list[int], list[str]]:
    tokens, bounds, longest = batch.titles(which)
    assert longest == bounds.diff().max() and len(tokens) == bounds[-1]
    assert (tokens == batch.tokens[batch.cu_seqlens[which * len(bounds[1:])] :][: len(tokens)]).all()
    rows = len(batch.product_ids)
    return tokens.tolist(), bounds.diff().tolist(), batch.keys[which * rows : (which + 1) * rows]


def assert_together(parts: list[Batch], whole: Batch, *, but: tuple[str, ...] = ()) -> None:
    """The parts, of all ranks in order, are the whole batch."""
    for name in PER_ROW:
        if name not in but:
            joined = torch.cat([getattr(part, name).cpu() for part in parts])
            assert torch.equal(joined, getattr(whole, name)), name
    for which in (0, 1):
        found = zip(*(view(part, which) for part in parts), strict=True)
        assert [list(itertools.chain(*values)) for values in found] == list(view(whole, which))
    assert {(part.step, part.epoch) for part in parts} == {(whole.step, whole.epoch)}
    assert [part.part for part in parts] == list(range(parts[0].parts)) * (len(parts) // parts[0].parts)


@pytest.fixture(scope="module")
def unsplit(index, tokenizer):
    """Every step as one batch, the sizes from a loader of that constant size where that is the same."""
    whole = [parts[0] for parts in steps(iter(loader(index, tokenizer)), 7)]
    assert [len(batch.product_ids) for batch in whole] == [4, 4, 8, 8, 8, 16, 16]
    return whole


def test_a_schedule_goes_through_the_stream_without_gap(index, tokenizer, unsplit):
    products = torch.cat([batch.product_ids for batch in unsplit]).tolist()
    for start in range(0, len(products) - 6, 7):
        assert len(set(products[start : start + 7])) == 7
    assert [batch.epoch for batch in unsplit] == [0, 0, 1, 2, 3, 4, 6]
    constant = next(iter(loader(index, tokenizer, 4)))
    assert torch.equal(constant.images, unsplit[0].images)


@pytest.mark.parametrize(
    ("decoder", "workers", "world_size", "micro_batch"),
    [
        ("torch", 0, 1, 2), ("torch", 3, 1, 4), ("torch", 2, 2, 1), ("torch", 2, 2, None), ("torch", 0, 4, 1),
        ("none", 0, 2, 2), ("dali", 1, 1, 2), ("dali", 2, 2, None),
    ],
)  # fmt: skip
def test_parts_are_the_unsplit_batch(index, tokenizer, unsplit, decoder, workers, world_size, micro_batch):
    if decoder == "dali":
        pytest.importorskip("nvidia.dali")
    options = {"decoder": decoder, "num_workers": workers, "world_size": world_size, "micro_batch": micro_batch}
    ranks = [steps(iter(loader(index, tokenizer, rank=r, **options)), 7) for r in range(world_size)]
    for step, whole in enumerate(unsplit):
        parts = [part for rank in ranks for part in rank[step]]
        assert len(ranks[0][step]) == (GROWING.size(step) // world_size // micro_batch if micro_batch else 1)
        assert_together(parts, whole, but=("images",) if decoder != "torch" else ())
        if decoder == "dali":  # its own resize
            near = torch.cat([part.images.cpu() for part in parts]).int() - whole.images.int()
            assert near.abs().float().mean() < 1


@pytest.mark.parametrize(("decoder", "workers"), [("torch", 0), ("torch", 2), ("none", 0), ("dali", 1)])
@pytest.mark.parametrize("taken", [0, 1, 2, 3, 5, 6, 9, 13])
def test_resumes_anywhere_on_any_number_of_ranks(index, tokenizer, unsplit, decoder, workers, taken):
    """Parts come 2, 2, 4, 4, 4, 8, 8 a step: a stop in the middle of a step repeats it whole."""
    if decoder == "dali":
        pytest.importorskip("nvidia.dali")
    options = {"decoder": decoder, "num_workers": workers}
    first = loader(index, tokenizer, micro_batch=2, **options)
    stream = iter(first)
    for _ in range(taken):
        next(stream)
    state = first.state_dict()
    stream.close()
    done = {0: 0, 1: 0, 2: 1, 3: 1, 5: 2, 6: 2, 9: 3, 13: 4}[taken]
    assert state["step"] == done
    but = () if decoder == "torch" else ("images",)
    (again,) = steps(iter(first), 1)
    assert_together(again, unsplit[done], but=but)
    for world_size, micro_batch in ((2, 1), (4, None)):
        ranks = [
            loader(index, tokenizer, rank=r, world_size=world_size, micro_batch=micro_batch, **options)
            for r in range(world_size)
        ]
        for rank in ranks:
            rank.load_state_dict(state)
        found = [steps(iter(rank), 2) for rank in ranks]
        for i in (0, 1):
            assert_together([part for rank in found for part in rank[i]], unsplit[done + i], but=but)


def test_a_stop_between_parts_repeats_their_step(index, tokenizer):
    data = loader(index, tokenizer, 8, micro_batch=2)
    stream = iter(data)
    seen = [(batch.step, batch.part, data.state_dict()["step"]) for batch in itertools.islice(stream, 6)]
    assert seen == [(0, 0, 0), (0, 1, 0), (0, 2, 0), (0, 3, 1), (1, 0, 1), (1, 1, 1)]


def test_the_past_must_be_the_same_and_the_future_may_change(index, tokenizer, unsplit):
    data = loader(index, tokenizer)
    stream = iter(data)
    states = [data.state_dict()]
    for _ in range(6):
        next(stream)
        states.append(data.state_dict())
    assert states[4]["batch_schedule"] == [[0, 4], [2, 8]]
    for text, step in (("0:4", 2), ("0:4,2:8", 5), ("0:4,1:4,2:8,7:4", 5), ("0:4,2:8,5:16,6:2", 6)):
        other = loader(index, tokenizer, BatchSchedule.parse(text))
        other.load_state_dict(states[step])
        batch = next(iter(other))
        size = other.schedule.size(step)
        assert batch.step == step and torch.equal(batch.product_ids[:4], unsplit[step].product_ids[: min(size, 4)])
    for text, step in (("0:8", 1), ("0:4", 3), ("0:4,3:8", 4), ("0:4,2:8,4:16", 5)):
        words = f"step {step}, has batch_schedule={GROWING.until(step)}, this run"
        with pytest.raises(ValueError, match=words) as error:
            loader(index, tokenizer, BatchSchedule.parse(text)).load_state_dict(states[step])
        assert "resume with the same batch schedule" in str(error.value) and "\n" not in str(error.value)


def test_a_state_with_the_position_of_an_earlier_step(index, tokenizer):
    """A trainer that has taken a batch more than it trained on saves its own step."""
    data = loader(index, tokenizer)
    stream = iter(data)
    for _ in range(3):
        next(stream)
    other = loader(index, tokenizer, BatchSchedule.parse("0:4"))
    other.load_state_dict({**data.state_dict(), "step": 2})  # step 2, of 8 products, was not trained on
    assert next(iter(other)).step == 2


def test_states_of_before_there_were_schedules(index, tokenizer):
    state = {"step": 3, "seed": 0, "global_batch_size": 4, "fingerprint": index.fingerprint}
    for sizes in (4, BatchSchedule.parse("0:4,3:8")):
        data = loader(index, tokenizer, sizes)
        data.load_state_dict(state)
        assert next(iter(data)).step == 3
    with pytest.raises(ValueError, match=r"batch_schedule=0:4, this run 0:4,2:8; resume"):
        loader(index, tokenizer).load_state_dict(state)


def test_steps_per_epoch(index, tokenizer):
    data = loader(index, tokenizer, BatchSchedule.parse("0:4,1:8"))
    assert data.steps_per_epoch == pytest.approx(1 + 3 / 8)
    next(iter(data))
    assert data.steps_per_epoch == pytest.approx(7 / 8)


def test_sizes_that_do_not_divide_are_refused(index, tokenizer):
    with pytest.raises(ValueError, match="2:8 does not divide over 1 rank x micro_batch=3|0:4 does not"):
        loader(index, tokenizer, micro_batch=3)
    with pytest.raises(ValueError, match="5:16 does not|0:4 does not divide over 8 ranks"):
        loader(index, tokenizer, world_size=8)


def an_image_of_late(index, tokenizer) -> tuple[int, int]:
    """The number of a late batch (parts of 2 of 8 products), and the row of an image that no earlier one holds."""
    plan = list(itertools.islice(loader(index, tokenizer, 8, decoder="none", micro_batch=2), 8))
    rows = [set(batch.image_rows.ravel().tolist()) for batch in plan]
    number = max(i for i in range(8) if rows[i] - set().union(*rows[:i]))
    assert number > 3
    return number, min(rows[number] - set().union(*rows[:number]))


@pytest.mark.parametrize(("decoder", "workers"), [("torch", 0), ("torch", 2), ("dali", 1)])
def test_an_error_comes_with_its_part(tmp_path, tokenizer, monkeypatch, decoder, workers):
    """Whoever is ahead of the training: the batches before it are given."""
    if decoder == "dali":
        pytest.importorskip("nvidia.dali")
    index = ShardIndex.open(make_split(tmp_path, image=lambda p, i: jpeg(i)), "train")
    options = {"decoder": decoder, "num_workers": workers, "micro_batch": 2}
    safe, lost = an_image_of_late(index, tokenizer)
    read = index.read_image

    def refuse(row):
        if row == lost:
            raise DataError("train-000000.tar: short")
        return read(row)

    monkeypatch.setattr(index, "read_image", refuse)
    stream = iter(loader(index, tokenizer, 8, **options))
    assert [(batch.step, batch.part) for batch in itertools.islice(stream, safe)] == [divmod(i, 4) for i in range(safe)]
    with pytest.raises(DataError, match=r"train-000000\.tar: short"):
        next(stream)


@pytest.mark.parametrize(("decoder", "workers"), [("torch", 0), ("torch", 1), ("dali", 1)])
def test_a_part_that_does_not_come_is_named(index, tokenizer, monkeypatch, decoder, workers):
    if decoder == "dali":
        pytest.importorskip("nvidia.dali")
    stuck, lost = an_image_of_late(index, tokenizer)
    answer, read = threading.Event(), index.read_image
    monkeypatch.setattr(index, "read_image", lambda row: (row == lost and answer.wait(60) and b"") or read(row))
    options = {"decoder": decoder, "num_workers": workers, "micro_batch": 2, "stall_seconds": 4}
    stream = iter(loader(index, tokenizer, 8, **options))
    # DALI gives a batch when it has been fed the second after it.
    first = max(0, stuck - 1) if decoder == "dali" else stuck
    late = f"step {first // 4}, part {first % 4 + 1} of 4"
    try:
        assert len(list(itertools.islice(stream, first))) == first
        with pytest.raises(DataError, match=rf"^{late}: no batch within 4 s .*--micro-batch$"):
            next(stream)
    finally:
        answer.set()


def test_a_loaders_batches_are_counted(index, tokenizer):
    batch = next(iter(loader(index, tokenizer)))
    without = dataclasses.replace(batch, token_counts=None, longest=None)
    for which in (0, 1):
        for mine, theirs in zip(batch.titles(which), without.titles(which), strict=True):
            assert torch.equal(torch.as_tensor(mine), torch.as_tensor(theirs))


@pytest.mark.gpu
@pytest.mark.parametrize(("decoder", "workers"), [("torch", 0), ("torch", 1), ("none", 0), ("dali", 1)])
def test_batches_are_pinned(index, tokenizer, decoder, workers):
    if decoder == "dali":
        pytest.importorskip("nvidia.dali")
    for batch in itertools.islice(loader(index, tokenizer, decoder=decoder, num_workers=workers, micro_batch=2), 6):
        for name, value in vars(batch).items():
            if isinstance(value, torch.Tensor):
                assert value.is_cuda if (name, decoder) == ("images", "dali") else value.is_pinned(), name
