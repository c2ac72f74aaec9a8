"""The cache of locked towers: same features as the towers, shared between runs, never stale."""

import dataclasses
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from eclip.config import RunConfig
from eclip.dataloading.pipeline import decode_square
from eclip.dataloading.shards import ShardIndex
from eclip.dataloading.text import WordPiece
from eclip.feature_cache import FeatureCache, _cached
from eclip.model.eclip import ECLIP
from eclip.model.image_encoder import ImageEncoder
from eclip.presets import PRESETS
from tests.dataloading.fixtures import jpeg, make_split
from tests.model.tiny import tiny

TINY = tiny(max_positions=64)

CONFIG = dataclasses.replace(PRESETS["debug"], model=TINY, lock_image=True, lock_text=True, cache_features=True)


@pytest.fixture
def parts(tmp_path: Path) -> tuple[ECLIP, ShardIndex, WordPiece]:
    torch.manual_seed(0)
    index = ShardIndex.open(make_split(tmp_path / "data", products=3, images=3, tars=1), "train")
    tokenizer = WordPiece.train([index.title(row) for row in range(index.num_images)], 64)
    return ECLIP(dataclasses.replace(TINY, vocab_size=64)).eval(), index, tokenizer


def _open(
    folder: Path, parts: tuple[ECLIP, ShardIndex, WordPiece], *, views: int = 1, config: RunConfig = CONFIG
) -> FeatureCache:
    return FeatureCache.build_or_open(folder, *parts, config, views=views, progress=False)


def test_view_0_is_the_towers_output_of_the_whole_image(
    tmp_path: Path, parts: tuple[ECLIP, ShardIndex, WordPiece]
) -> None:
    model, index, tokenizer = parts
    rows = torch.tensor([[0, 4], [8, 1]])
    found = _open(tmp_path, parts).lookup(rows, step=0, seed=0)
    for place in np.ndindex(2, 2):
        row = int(rows[place])
        with torch.inference_mode():
            image = model.image_tower(decode_square(index.read_image(row), 32)[None])[0]
            text = model.text_tower(*tokenizer.encode([index.title(row)]))[0]
        # float16 storage, and bfloat16 products where the chip has them
        torch.testing.assert_close(found.images[place], image, rtol=0.05, atol=0.05)
        torch.testing.assert_close(found.texts[place], text, rtol=2e-3, atol=2e-3)


def test_views_differ_and_the_choice_is_a_function_of_seed_step_and_row(
    tmp_path: Path, parts: tuple[ECLIP, ShardIndex, WordPiece]
) -> None:
    cache = _open(tmp_path, parts, views=3)
    assert cache.images.shape[:2] == (9, 3)
    assert not np.array_equal(cache.images[0, 0], cache.images[0, 1])
    assert np.array_equal(cache.tower_outputs(np.array([0]))[0], cache.images[0, 0].astype(np.float32))
    rows = torch.zeros(1, 2, dtype=torch.long)
    looks = [cache.lookup(rows, step=step, seed=0).images[0, 0] for step in range(30)]
    assert torch.equal(looks[7], cache.lookup(rows, step=7, seed=0).images[0, 0])
    assert len({look.sum().item() for look in looks}) == 3, "every view comes up"


def test_a_second_run_reads_what_the_first_wrote(tmp_path: Path, parts: tuple[ECLIP, ShardIndex, WordPiece]) -> None:
    one = _open(tmp_path, parts)
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.npy")}
    assert len(stamps) == 2
    two = _open(tmp_path, parts)
    assert np.array_equal(one.images, two.images)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.npy")} == stamps


def test_another_tower_or_another_catalogue_gets_its_own_files(
    tmp_path: Path, parts: tuple[ECLIP, ShardIndex, WordPiece]
) -> None:
    model, _, tokenizer = parts
    folder = tmp_path / "features"
    _open(folder, parts)
    with torch.no_grad():
        next(model.image_encoder.parameters()).add_(1)
    _open(folder, parts)
    assert len(list(folder.glob("images-*.npy"))) == 2
    assert len(list(folder.glob("texts-*.npy"))) == 1
    other = ShardIndex.open(make_split(tmp_path / "other", products=2, images=3, tars=1), "train")
    _open(folder, (model, other, tokenizer))
    assert len(list(folder.glob("images-*.npy"))) == 3


def test_an_interrupted_build_leaves_no_half_cache(
    tmp_path: Path, parts: tuple[ECLIP, ShardIndex, WordPiece], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: ImageEncoder, images: torch.Tensor) -> torch.Tensor:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ImageEncoder, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            _open(tmp_path, parts)
    assert list(tmp_path.glob("*.npy")) == []
    assert np.isfinite(_open(tmp_path, parts).images).all()


def test_two_runs_at_once_fill_the_cache_once(tmp_path: Path) -> None:
    """The second waits for the first instead of writing into its file."""
    path, filling, go_on, calls = tmp_path / "x.npy", threading.Event(), threading.Event(), []

    def fill(out: np.memmap) -> None:
        calls.append(threading.current_thread().name)
        filling.set()
        assert go_on.wait(30)
        out[:] = 1

    runs = [threading.Thread(target=_cached, args=(path, (2, 3), fill)) for _ in range(2)]
    runs[0].start()
    assert filling.wait(30)
    runs[1].start()
    runs[1].join(0.5)
    assert runs[1].is_alive()
    go_on.set()
    for run in runs:
        run.join(30)
    assert calls == [runs[0].name]
    assert (np.load(path) == 1).all()


def test_an_undecodable_image_is_named_and_a_sibling_stands_in(
    tmp_path: Path, parts: tuple[ECLIP, ShardIndex, WordPiece], caplog: pytest.LogCaptureFixture
) -> None:
    def image(p: int, i: int) -> bytes:
        return b"no image" if (p, i) == (1, 1) else jpeg(100 * p + i)

    index = ShardIndex.open(make_split(tmp_path / "bad", products=3, images=3, tars=1, image=image), "train")
    cache = _open(tmp_path, (parts[0], index, parts[2]))
    assert "k001/001.jpg" in caplog.text
    assert np.array_equal(cache.images[4], cache.images[3])


def test_only_what_is_locked_is_cached(tmp_path: Path, parts: tuple[ECLIP, ShardIndex, WordPiece]) -> None:
    cache = _open(tmp_path, parts, config=dataclasses.replace(CONFIG, lock_text=False))
    assert cache.lookup(torch.zeros(1, 2, dtype=torch.long), step=0, seed=0).texts is None
