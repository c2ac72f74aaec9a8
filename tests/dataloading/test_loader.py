"""The loader: what a batch holds, exact resume, ranks and workers that change nothing, corrupt images replaced."""

import dataclasses
import itertools
import multiprocessing
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from eclip.dataloading.errors import DataError
from eclip.dataloading.loader import ProductLoader, choose_decoder
from eclip.dataloading.schema import Batch
from eclip.dataloading.shards import ShardIndex, stable_hash
from eclip.dataloading.text import Tokenizer
from tests.dataloading.fixtures import jpeg, make_split

SIZE = 16
BAD = {
    (2, 1): b"not an image",
    (2, 4): jpeg(1)[:900],
    (4, 5): jpeg(1)[:200],
    (5, 0): b"",
    (3, 2): b"GIF89a" + b"\0" * 40,
}


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return ShardIndex.open(make_split(tmp_path_factory.mktemp("data")), "train")


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    folder = make_split(tmp_path_factory.mktemp("bad"), image=lambda p, i: BAD.get((p, i), jpeg(100 * p + i)))
    return ShardIndex.open(folder, "train")


@pytest.fixture(scope="module")
def tokenizer(index):
    return Tokenizer.train(index.texts(), vocab_size=128)


def loader(index, tokenizer, **changes):
    options = {"global_batch_size": 4, "image_size": SIZE, "decoder": "torch", "num_workers": 0, "max_tokens": 12}
    return ProductLoader(index, tokenizer, **{**options, **changes})


def take(stream, n):
    return list(itertools.islice(stream, n))


def assert_equal(a: Batch, b: Batch, *, but=()):
    for f in dataclasses.fields(Batch):
        x, y = getattr(a, f.name), getattr(b, f.name)
        if f.name not in but:
            assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y, f.name


def test_batch_holds_what_its_schema_says(index, tokenizer):
    for step, batch in enumerate(take(loader(index, tokenizer), 4)):
        assert batch.images.shape == (4, 2, 3, SIZE, SIZE) and batch.images.dtype == torch.uint8
        assert batch.image_rows.shape == batch.title_ids.shape == (4, 2) and batch.image_rows.dtype == torch.int64
        assert batch.cu_seqlens.shape == (9,) and batch.cu_seqlens.dtype == torch.int32
        assert batch.tokens.dtype == torch.int64 and len(batch.tokens) == batch.cu_seqlens[-1]
        rows = batch.image_rows.T.ravel().tolist()
        assert batch.keys == [index.image_key(row) for row in rows]
        for s, row in enumerate(rows):
            expected = tokenizer.encode([index.title(row)], 12)[0]
            assert torch.equal(batch.tokens[batch.cu_seqlens[s] : batch.cu_seqlens[s + 1]], expected)
        products = [index.product(index.product_of(row)) for row in rows[:4]]
        assert batch.product_ids.tolist() == [stable_hash(p.product) for p in products]
        assert batch.catalog_ids.tolist() == [stable_hash(p.catalog) for p in products]
        assert [index.categories[c] for c in batch.category_ids] == [p.category for p in products]
        assert batch.title_ids.ravel().tolist() == [stable_hash(index.title(int(r))) for r in batch.image_rows.ravel()]
        assert (batch.step, batch.epoch, batch.corrupt) == (step, step * 4 // 7, ())


@pytest.mark.parametrize("decoder, workers", [("torch", 0), ("torch", 2), ("none", 0), ("dali", 1)])
def test_resumes_to_the_exact_next_batch(index, tokenizer, decoder, workers):
    if decoder == "dali":
        pytest.importorskip("nvidia.dali")
    options = {"decoder": decoder, "num_workers": workers}
    straight = take(loader(index, tokenizer, **options), 6)
    for stop in (0, 1, 4):
        first = loader(index, tokenizer, **options)
        stream = iter(first)
        take(stream, stop)
        state = first.state_dict()
        stream.close()
        second = loader(index, tokenizer, **options)
        second.load_state_dict(state)
        for mine, theirs in zip(take(second, 6 - stop), straight[stop:], strict=True):
            assert_equal(mine, theirs)
    if decoder == "none":
        assert straight[0].images is None


def test_new_iterator_continues(index, tokenizer):
    straight = take(loader(index, tokenizer), 4)
    stopped = loader(index, tokenizer)
    for expected in straight:
        assert_equal(take(stopped, 1)[0], expected)


def test_workers_and_decoders_change_nothing_but_pixels(index, tokenizer):
    straight = take(loader(index, tokenizer), 5)
    for batch, other in zip(straight, take(loader(index, tokenizer, num_workers=2), 5), strict=True):
        assert_equal(batch, other)
    for batch, other in zip(straight, take(loader(index, tokenizer, decoder="none"), 5), strict=True):
        assert_equal(batch, other, but=("images",))


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_split_the_global_batch(index, tokenizer, world_size):
    whole = take(loader(index, tokenizer), 3)
    ranks = [take(loader(index, tokenizer, rank=r, world_size=world_size), 3) for r in range(world_size)]
    for step, batch in enumerate(whole):
        for name in ("images", "image_rows", "product_ids", "title_ids", "category_ids"):
            assert torch.equal(torch.cat([getattr(rank[step], name) for rank in ranks]), getattr(batch, name))
        half = 4 // world_size
        assert [k for rank in ranks for k in rank[step].keys[:half]] == batch.keys[:4]


def test_crops_differ_between_views_and_steps(tmp_path, tokenizer):
    index = ShardIndex.open(make_split(tmp_path, products=1, images=1, tars=1, image=lambda p, i: jpeg(0)), "train")
    images = [
        batch.images[0, view] for batch in take(loader(index, tokenizer, global_batch_size=1), 6) for view in (0, 1)
    ]
    assert len({image.numpy().tobytes() for image in images}) == 12


@pytest.mark.parametrize("decoder, workers", [("torch", 0), ("torch", 2), ("dali", 2)])
def test_corrupt_images_are_replaced_and_reported_once(damaged, tokenizer, caplog, decoder, workers):
    if decoder == "dali":
        pytest.importorskip("nvidia.dali")
    expected = {damaged.image_key(6 * p + i) for p, i in BAD}
    data = loader(damaged, tokenizer, decoder=decoder, num_workers=workers, global_batch_size=8)
    batches = take(data, 30)
    assert set(data.corrupt) == expected and all(data.corrupt.values())
    reported = [key for batch in batches for key in batch.corrupt]
    assert sorted(reported) == sorted(expected)
    assert sum("undecodable image" in record.message for record in caplog.records) == len(expected)
    oracle = take(loader(damaged, tokenizer, global_batch_size=8), 30)
    drawn = take(loader(damaged, tokenizer, global_batch_size=8, decoder="none"), 30)
    for batch, right, plan in zip(batches, oracle, drawn, strict=True):
        assert_equal(batch, right, but=("images", "corrupt"))
        assert not expected & set(batch.keys)
        assert torch.equal(batch.product_ids, plan.product_ids)
        bad = torch.tensor([[damaged.image_key(r) in expected for r in pair] for pair in plan.image_rows.tolist()])
        assert torch.equal(batch.image_rows[~bad.any(1)], plan.image_rows[~bad.any(1)])


@pytest.mark.parametrize("decoder", ["torch", "dali"])
def test_product_without_a_good_image_gives_way_to_the_next(tmp_path, tokenizer, decoder):
    if decoder == "dali":
        pytest.importorskip("nvidia.dali")
    folder = make_split(tmp_path, products=3, images=3, tars=1, image=lambda p, i: b"x" if p == 1 else jpeg(i))
    index = ShardIndex.open(folder, "train")
    (batch,) = take(loader(index, tokenizer, decoder=decoder, global_batch_size=3), 1)
    assert sorted(batch.product_ids.tolist()) == sorted(index.product_ids[[0, 2, 2]].tolist())
    assert [k.split("/")[0] for k in batch.keys[:3]] == [k.split("/")[0] for k in batch.keys[3:]]
    assert (batch.image_rows[:, 0] != batch.image_rows[:, 1]).all()


@pytest.mark.parametrize("decoder, workers", [("torch", 0), ("torch", 1), ("dali", 1)])
def test_catalogue_of_bad_images_stops_with_a_clear_line(tmp_path, tokenizer, decoder, workers):
    if decoder == "dali":
        pytest.importorskip("nvidia.dali")
    index = ShardIndex.open(make_split(tmp_path, image=lambda p, i: b"x"), "train")
    with pytest.raises(ValueError, match="pack the catalogue again"):
        take(loader(index, tokenizer, decoder=decoder, num_workers=workers), 1)


def test_state_of_another_run_is_refused(index, damaged, tokenizer):
    state = loader(index, tokenizer).state_dict()
    for other in (
        loader(index, tokenizer, seed=1),
        loader(index, tokenizer, global_batch_size=8),
        loader(damaged, tokenizer),
    ):
        with pytest.raises(ValueError, match="resume with the same"):
            other.load_state_dict(state)
    loader(index, tokenizer, rank=1, world_size=2).load_state_dict(state)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"global_batch_size": 5, "world_size": 2}, "multiple of 2"),
        ({"global_batch_size": 0}, "global_batch_size=0"),
        ({"rank": 2, "world_size": 2}, "rank=2"),
        ({"crop_scale": (0.0, 1.0)}, "crop_scale"),
        ({"crop_scale": (0.9, 0.5)}, "crop_scale"),
        ({"image_size": 0}, "image_size=0"),
        ({"num_workers": -1}, "num_workers=-1"),
        ({"stall_seconds": -1}, "stall_seconds=-1"),
        ({"stall_seconds": float("nan")}, "stall_seconds=nan"),
        ({"decoder": "opencv"}, "use auto, dali, torch or none"),
    ],
)
def test_impossible_settings_are_refused(index, tokenizer, changes, message):
    with pytest.raises(ValueError, match=message):
        loader(index, tokenizer, **changes)


def test_decoder_choice(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_decoder("auto") == "torch" and choose_decoder("none") == "none"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="nvidia-dali-cuda130"):
        choose_decoder("dali")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_decoder("auto") == "torch"


@pytest.mark.parametrize(("decoder", "workers"), [("torch", 0), ("torch", 1), ("dali", 1)])
def test_store_that_does_not_answer_is_named(index, tokenizer, monkeypatch, decoder, workers):
    if decoder == "dali":
        pytest.importorskip("nvidia.dali")
    answer = threading.Event()
    read = index.read_image
    monkeypatch.setattr(index, "read_image", lambda row: answer.wait(60) and read(row))
    stream = iter(loader(index, tokenizer, decoder=decoder, num_workers=workers, stall_seconds=0.2))
    try:
        with pytest.raises(DataError, match=r"step 0: no batch within 0\.2 s \(--stall-seconds\).* slow ") as error:
            next(stream)
        assert "\n" not in str(error.value)
    finally:
        answer.set()


@pytest.mark.parametrize(("decoder", "workers"), [("torch", 0), ("torch", 1), ("dali", 1)])
def test_batch_that_memory_does_not_hold_is_one_line(index, tokenizer, monkeypatch, decoder, workers):
    def refuse(self, row):
        raise MemoryError("no 9 GiB")

    monkeypatch.setattr(ShardIndex, "read_image", refuse)
    stream = iter(loader(index, tokenizer, decoder=decoder, num_workers=workers))
    with pytest.raises(DataError, match=r"step 0: no memory for its batch \(no 9 GiB\); use .*--global-batch-size"):
        next(stream)


def test_limit_is_for_a_batch_not_for_its_use(index, tokenizer):
    stream = iter(loader(index, tokenizer, num_workers=1, stall_seconds=5))
    assert [next(stream).step for _ in range(6)] == list(range(6))
    unlimited = iter(loader(index, tokenizer, num_workers=1, stall_seconds=0))
    assert next(unlimited).step == 0


def test_steps_per_epoch(index, tokenizer):
    assert loader(index, tokenizer).steps_per_epoch == pytest.approx(7 / 4)


def test_workers_end_with_their_iterator(index, tokenizer):
    before = set(multiprocessing.active_children())
    stream = iter(loader(index, tokenizer, num_workers=2))
    next(stream)
    assert len(set(multiprocessing.active_children()) - before) == 2
    stream.close()
    assert set(multiprocessing.active_children()) <= before


@pytest.mark.parametrize(("decoder", "workers"), [("torch", 1), ("torch", 0), ("dali", 1)])
def test_program_that_just_ends_exits_cleanly(index, decoder, workers):
    if decoder == "dali":
        pytest.importorskip("nvidia.dali")
    script = (
        "from pathlib import Path\nfrom eclip.dataloading.loader import ProductLoader\n"
        "from eclip.dataloading.shards import ShardIndex\nfrom eclip.dataloading.text import Tokenizer\n"
        f"index = ShardIndex.open(Path({str(index.data_dir)!r}), 'train')\n"
        "tokenizer = Tokenizer.train(index.texts())\n"
        f"loader = ProductLoader(index, tokenizer, global_batch_size=4, image_size=16, decoder={decoder!r},\n"
        f"                       num_workers={workers})\n"
        "stream = iter(loader)\nnext(stream), next(stream)\nprint('done')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
    assert "Traceback" not in done.stderr and "terminate" not in done.stderr


def test_rows_are_the_feature_caches_keys(index, tokenizer):
    batch = take(loader(index, tokenizer, decoder="none"), 1)[0]
    assert np.all((batch.image_rows >= 0).numpy() & (batch.image_rows < index.num_images).numpy())
