"""What a loader takes: the formula against what workers allocate, and the refusal."""

import mmap

import pytest
import torch

from eclip.dataloading import needs as module
from eclip.dataloading.loader import ProductLoader
from eclip.dataloading.needs import Needs, loader_needs, require_memory
from eclip.dataloading.schedule import BatchSchedule
from eclip.dataloading.shards import ShardIndex
from eclip.dataloading.text import Tokenizer
from tests.dataloading.fixtures import make_split


def test_the_figure_of_a_node() -> None:
    assert 8 * loader_needs(512, 224, 8, "torch").shared_bytes == 8 * 8 * 2 * 512 * 6 * 224 * 224  # 19.7 GB


def test_workers_share_what_they_allocate(tmp_path, monkeypatch) -> None:
    allocated = []

    class Counted(mmap.mmap):
        def __new__(cls, file, length):
            allocated.append(length)
            return super().__new__(cls, file, length)

    index = ShardIndex.open(make_split(tmp_path), "train")
    tokenizer = Tokenizer.train(index.texts(), vocab_size=128)
    schedule = BatchSchedule.parse("0:2,1:8")
    for micro_batch in (None, 2):
        loader = ProductLoader(
            index, tokenizer, global_batch_size=schedule, micro_batch=micro_batch, image_size=16, decoder="torch",
            num_workers=3,
        )  # fmt: skip
        allocated.clear()
        with monkeypatch.context() as patch:
            patch.setattr("mmap.mmap", Counted)
            stream = iter(loader)
            next(stream)
        assert sum(allocated) == loader.needs.shared_bytes == 3 * 2 * (micro_batch or 8) * 6 * 16 * 16
        stream.close()


@pytest.mark.parametrize(
    ("decoder", "workers"), [("torch", 0), ("torch", 4), ("dali", 4), ("none", 0)]
)  # fmt: skip
def test_needs_grow_with_what_they_stand_for(decoder, workers) -> None:
    small, large = (loader_needs(rows, 224, workers, decoder).host_bytes for rows in (64, 512))
    assert small == large == 0 if decoder == "none" else 0 < small < large
    assert loader_needs(64, 224, workers, decoder, held=9).host_bytes >= small
    assert (loader_needs(64, 224, workers, decoder).shared_bytes > 0) == (decoder == "torch" and workers > 0)


def test_on_a_gpu() -> None:
    images = 96 * 6 * 224 * 224
    assert loader_needs(96, 224, 2, "dali", on_gpu=True) == loader_needs(512, 224, 2, "dali", on_gpu=True)
    pinned = loader_needs(96, 224, 2, "torch", on_gpu=True)
    more = pinned.private_bytes - loader_needs(96, 224, 2, "torch").private_bytes
    assert more == 3 * ((1 << 25) - images) > 0  # powers of two
    assert pinned.shared_bytes == 4 * images


def test_refusal(monkeypatch) -> None:
    needs = Needs(shared_bytes=2_500_000_000, private_bytes=500_000_000)
    require_memory(needs, available=3_000_000_000)
    require_memory(needs, loaders=8, available=24_000_000_000)
    with pytest.raises(ValueError, match=r"the loader would take 3\.0 GB .*\(2\.5 GB of it .*\), 2\.9 GB are") as error:
        require_memory(needs, available=2_900_000_000)
    assert all(flag in str(error.value) for flag in ("--num-workers", "--micro-batch", "--global-batch-size"))
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"the loaders of 8 ranks on this machine would take 24\.0 GB .*20\.0 GB"):
        require_memory(needs, loaders=8, available=23_000_000_000)
    monkeypatch.setattr(module, "available_memory", lambda: None)
    require_memory(needs)
    monkeypatch.setattr(module, "available_memory", lambda: 1)
    with pytest.raises(ValueError, match=r"0\.0 GB are available"):
        require_memory(needs)


def test_the_loader_says_what_it_needs(tmp_path) -> None:
    index = ShardIndex.open(make_split(tmp_path), "train")
    tokenizer = Tokenizer.train(index.texts(), vocab_size=128)
    options = {"global_batch_size": 64, "image_size": 32, "num_workers": 2, "world_size": 2}
    gpu = torch.cuda.is_available()
    assert ProductLoader(index, tokenizer, decoder="torch", **options).needs == loader_needs(
        32, 32, 2, "torch", on_gpu=gpu
    )
    assert ProductLoader(index, tokenizer, decoder="none", **options).needs.host_bytes == 0
