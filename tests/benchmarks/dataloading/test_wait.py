"""The measurement of waits: it sees a batch that is late, and none where there is time."""

import time

from benchmarks.dataloading import wait
from eclip.dataloading.loader import ProductLoader
from eclip.dataloading.shards import ShardIndex
from eclip.dataloading.text import Tokenizer
from tests.dataloading.fixtures import make_split


def test_late_batches_are_seen(tmp_path, monkeypatch) -> None:
    index = ShardIndex.open(make_split(tmp_path), "train")
    read = index.read_image

    def slowly(row: int) -> bytes:
        time.sleep(0.01)
        return read(row)

    monkeypatch.setattr(index, "read_image", slowly)
    loader = ProductLoader(
        index, Tokenizer.train(index.texts(), 128), global_batch_size=8, image_size=16, decoder="torch", num_workers=0
    )
    late, _ = wait.waits(loader, step=0.0, batches=3)  # 16 reads a batch
    assert late > 100
    early, work = wait.waits(loader, step=1.0, batches=3)
    assert early < late / 2 and work < 100


def test_command(capsys) -> None:
    small = ["--batch", "4", "--batches", "2", "--step", "0", "--stored", "32", "--size", "16"]
    wait.main(["--decoders", "none:0", "torch:1", *small])
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.startswith("4 products a batch")
    assert [line.split(" | ")[0] for line in lines] == ["none:0", "torch:1"]
