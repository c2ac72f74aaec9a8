"""Images a second from packed shards to training batches: DALI, the torch loader, and Pillow without tricks.

All three read the embedded catalogue's JPEGs, cut a box, and resize it to a square. `pillow` decodes each image in
full, in this process; `torch` lets the JPEG library decode at a smaller scale where the crop allows it, and like `dali`
also makes the rest of the batch (titles, ids).
"""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.harness.bench import Bench
from benchmarks.harness.machine import ON_GPU
from eclip.dataloading.demo import pack_demo
from eclip.dataloading.loader import ProductLoader
from eclip.dataloading.shards import ShardIndex
from eclip.dataloading.text import Tokenizer

STORED, SIZE = 160, 96  # pixels: side of the shards' JPEGs, and of the batch's crops
PRODUCTS = None if ON_GPU else 24
BATCH, BATCHES = (64, 8) if ON_GPU else (8, 4)  # products a batch (two images each), batches a round
WORKERS = 8 if ON_GPU else 1


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    folder: Path = tmp_path_factory.mktemp("demo")
    pack_demo(folder, image_size=STORED, images_per_product=6, limit=PRODUCTS, progress=False)
    return ShardIndex.open(folder, "train")


@pytest.mark.parametrize("decoder", ["torch", "dali"])
def test_loader(bench: Bench, index: ShardIndex, decoder: str) -> None:
    if decoder == "dali":
        pytest.importorskip("nvidia.dali")
    loader = ProductLoader(
        index,
        Tokenizer.train(index.texts(), 512),
        global_batch_size=BATCH,
        image_size=SIZE,
        decoder=decoder,  # type: ignore[arg-type]
        num_workers=WORKERS,
    )
    batches = iter(loader)

    def call() -> None:
        for _ in range(BATCHES):
            images = next(batches).images
            assert images is not None
            assert images.shape == (BATCH, 2, 3, SIZE, SIZE)

    record(bench, call, provider=f"{decoder}, {WORKERS} worker{'s' * (WORKERS > 1)}")
    batches.close()  # type: ignore[attr-defined]
    assert not loader.corrupt


def test_pillow(bench: Bench, index: ShardIndex) -> None:
    rows = np.arange(2 * BATCH * BATCHES) % index.num_images
    box = (0.1 * STORED, 0.1 * STORED, 0.9 * STORED, 0.9 * STORED)

    def call() -> None:
        for row in rows:
            image = Image.open(io.BytesIO(index.read_image(int(row)))).convert("RGB")
            np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=box))

    record(bench, call, provider="pillow, this process")


def record(bench: Bench, call: Callable[[], None], *, provider: str) -> None:
    bench(
        call,
        op="decode",
        provider=provider,
        shape=f"{STORED} px JPEG to {SIZE} px crop",
        dtype=torch.uint8,
        images=2 * BATCH * BATCHES,
        rounds=5,
        warmup=1,
        graph=False,
    )
