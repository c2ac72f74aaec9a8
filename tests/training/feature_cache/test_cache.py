"""The cache of locked towers: same features as the towers, shared between runs, never stale."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from eclip.config import RunConfig
from eclip.dataloading.pipeline import decode_square
from eclip.dataloading.shards import ShardIndex
from eclip.dataloading.text import Tokenizer
from eclip.model.eclip import ECLIP
from eclip.model.image_encoder import ImageEncoder
from eclip.presets import PRESETS
from eclip.training.feature_cache.cache import FeatureCache
from tests.dataloading.fixtures import jpeg, make_split
from tests.helpers import rank_environment
from tests.model.tiny import tiny

TINY = tiny(max_positions=64)

CONFIG = dataclasses.replace(PRESETS["debug"], model=TINY, lock_image=True, lock_text=True, cache_features=True)


def make_parts(folder: Path, *, new: bool = True) -> tuple[ECLIP, ShardIndex, Tokenizer]:
    torch.manual_seed(0)
    data_dir = make_split(folder / "data", products=3, images=3, tars=1) if new else folder / "data"
    index = ShardIndex.open(data_dir, "train")
    tokenizer = Tokenizer.train([index.title(row) for row in range(index.num_images)], 64)
    return ECLIP(dataclasses.replace(TINY, vocab_size=64)).eval(), index, tokenizer


@pytest.fixture
def parts(tmp_path: Path) -> tuple[ECLIP, ShardIndex, Tokenizer]:
    return make_parts(tmp_path)


def _open(
    folder: Path, parts: tuple[ECLIP, ShardIndex, Tokenizer], *, views: int = 1, config: RunConfig = CONFIG
) -> FeatureCache:
    return FeatureCache.build_or_open(folder, *parts, config, views=views, progress=False)


def test_view_0_is_the_towers_output_of_the_whole_image(
    tmp_path: Path, parts: tuple[ECLIP, ShardIndex, Tokenizer]
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
    tmp_path: Path, parts: tuple[ECLIP, ShardIndex, Tokenizer]
) -> None:
    cache = _open(tmp_path, parts, views=3)
    assert cache.images.shape[:2] == (9, 3)
    assert not np.array_equal(cache.images[0, 0], cache.images[0, 1])
    assert np.array_equal(cache.tower_outputs(np.array([0]))[0], cache.images[0, 0].astype(np.float32))
    rows = torch.zeros(1, 2, dtype=torch.long)
    looks = [cache.lookup(rows, step=step, seed=0).images[0, 0] for step in range(30)]
    assert torch.equal(looks[7], cache.lookup(rows, step=7, seed=0).images[0, 0])
    assert len({look.sum().item() for look in looks}) == 3, "every view comes up"


def test_a_second_run_reads_what_the_first_wrote(tmp_path: Path, parts: tuple[ECLIP, ShardIndex, Tokenizer]) -> None:
    one = _open(tmp_path, parts)
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.npy")}
    assert len(stamps) == 2
    two = _open(tmp_path, parts)
    assert np.array_equal(one.images, two.images)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.npy")} == stamps


def test_another_tower_or_another_catalogue_gets_its_own_files(
    tmp_path: Path, parts: tuple[ECLIP, ShardIndex, Tokenizer]
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


def test_an_interrupted_build_is_continued_and_equal_to_an_unbroken_one(
    tmp_path: Path, parts: tuple[ECLIP, ShardIndex, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, calls = ImageEncoder.forward, []

    def interrupted(self: ImageEncoder, images: torch.Tensor) -> torch.Tensor:
        calls.append(len(images))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return forward(self, images)

    unbroken = _open(tmp_path / "unbroken", parts, views=16)
    monkeypatch.setattr(ImageEncoder, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _open(tmp_path, parts, views=16)
    assert list(tmp_path.glob("*.npy")) == []
    found = _open(tmp_path, parts, views=16)
    assert calls == [32] * 3 + [32] * 2 + [16]  # two of the five batches were done; the third again, and the rest
    assert np.array_equal(found.images, unbroken.images) and np.isfinite(found.images).all()


def test_processes_fill_one_cache_together(tmp_path: Path, parts: tuple[ECLIP, ShardIndex, Tokenizer]) -> None:
    """Two processes as ranks are, without any collective: same files, same features in both."""
    code = f"""
import sys, torch
from pathlib import Path
from tests.training.feature_cache.test_cache import CONFIG, TINY, make_parts, _open
parts = make_parts(Path({str(tmp_path)!r}), new=False)
found = _open(Path({str(tmp_path / "features")!r}), parts, views=16)
print(found.lookup(torch.arange(8).reshape(4, 2), step=3, seed=0).images.sum().item())
"""
    ranks = [
        subprocess.Popen([sys.executable, "-c", code], env=rank_environment(), stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    try:
        said = [rank.communicate(timeout=120)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    alone = _open(tmp_path / "alone", parts, views=16).lookup(torch.arange(8).reshape(4, 2), step=3, seed=0)
    assert said == [f"{alone.images.sum().item()}\n"] * 2
    assert [p.suffix for p in sorted((tmp_path / "features").iterdir()) if p.suffix != ".lock"] == [".npy"] * 2


def test_both_images_of_a_pair_are_never_the_same_view(
    tmp_path: Path, parts: tuple[ECLIP, ShardIndex, Tokenizer]
) -> None:
    """Of one image, and of an undecodable one that the other stands in for."""

    def image(p: int, i: int) -> bytes:
        return b"no image" if (p, i) == (1, 1) else jpeg(100 * p + i)

    index = ShardIndex.open(make_split(tmp_path / "bad", products=3, images=3, tars=1, image=image), "train")
    for views in (2, 3):
        cache = _open(tmp_path, (parts[0], index, parts[2]), views=views)
        assert cache.undecodable.keys() == {4}
        rows = torch.tensor([[0, 0], [5, 5], [3, 4], [4, 3], [0, 1]])
        for step in range(40):
            a, b = cache.lookup(rows, step=step, seed=1).images.unbind(1)
            assert not (a == b).flatten(1).all(1).any(), step
        firsts = {a.sum().item() for a in (cache.lookup(rows[:1], step=s, seed=1).images[0, 0] for s in range(60))}
        seconds = {b.sum().item() for b in (cache.lookup(rows[:1], step=s, seed=1).images[0, 1] for s in range(60))}
        assert firsts == seconds and len(firsts) == views, "every view comes up on both sides"


def test_the_choice_of_views_knows_the_column_and_nothing_of_the_batch(
    tmp_path: Path, parts: tuple[ECLIP, ShardIndex, Tokenizer]
) -> None:
    cache = _open(tmp_path, parts, views=3)
    rows = torch.tensor([[0, 4], [8, 8], [2, 1], [7, 5]])
    whole = cache.lookup(rows, step=5, seed=2).images
    for place in range(4):  # as on four ranks
        assert torch.equal(cache.lookup(rows[place : place + 1], step=5, seed=2).images[0], whole[place])
    sides = [cache.lookup(torch.tensor([[0, 4], [4, 0]]), step=step, seed=0).images for step in range(30)]
    assert any(not torch.equal(pair[0, 0], pair[1, 1]) for pair in sides)
    assert any(torch.equal(pair[0, 0], pair[1, 1]) for pair in sides)


@pytest.mark.parametrize(("value", "message"), [
    (float("nan"), r"image tower gives NaN or infinity for 9 of 9 at once \(k000/000.jpg, .*, \.\.\.\)"),
    (float("inf"), "image tower gives NaN or infinity"),
    (1e5, "k000/000.jpg: the image tower's features reach [0-9]+, more than the 65504 .* --no-cache-features"),
])  # fmt: skip
def test_features_that_float16_cannot_hold_are_refused(
    tmp_path: Path, parts: tuple[ECLIP, ShardIndex, Tokenizer], value: float, message: str
) -> None:
    model = parts[0]
    with torch.no_grad():
        model.image_encoder.norm.bias.fill_(value)
    with pytest.raises(ValueError, match=message) as refusal:
        _open(tmp_path / "features", parts)
    assert "\n" not in str(refusal.value)
    assert [p for p in (tmp_path / "features").iterdir() if p.suffix != ".lock"] == []


def test_one_bad_image_is_named_alone(
    tmp_path: Path, parts: tuple[ECLIP, ShardIndex, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = ImageEncoder.forward

    def one_nan(self: ImageEncoder, images: torch.Tensor) -> torch.Tensor:
        features = forward(self, images).clone()
        features[5, 3, 2] = float("nan")
        return features

    monkeypatch.setattr(ImageEncoder, "forward", one_nan)
    with pytest.raises(ValueError, match=r"for 1 of 9 at once \(k001/002.jpg\)"):
        _open(tmp_path / "features", parts)


def test_titles_that_are_not_finite_are_named(tmp_path: Path, parts: tuple[ECLIP, ShardIndex, Tokenizer]) -> None:
    with torch.no_grad():
        for parameter in parts[0].text_encoder.parameters():
            parameter.fill_(float("nan"))
    with pytest.raises(ValueError, match="text tower gives NaN or infinity for .* the title '"):
        _open(tmp_path / "features", parts)


def test_an_undecodable_image_is_named_and_a_sibling_stands_in(
    tmp_path: Path, parts: tuple[ECLIP, ShardIndex, Tokenizer], caplog: pytest.LogCaptureFixture
) -> None:
    def image(p: int, i: int) -> bytes:
        return b"no image" if (p, i) == (1, 1) else jpeg(100 * p + i)

    index = ShardIndex.open(make_split(tmp_path / "bad", products=3, images=3, tars=1, image=image), "train")
    cache = _open(tmp_path, (parts[0], index, parts[2]))
    assert "k001/001.jpg" in caplog.text
    assert np.array_equal(cache.images[4], cache.images[3])
    caplog.clear()
    again = FeatureCache.build_or_open(tmp_path, parts[0], index, parts[2], CONFIG)
    assert "others stand in for 1 undecodable images (k001/001.jpg)" in caplog.text
    assert again.undecodable == cache.undecodable and list(again.undecodable) == [4]
    assert "not a readable" in again.undecodable[4]


def test_only_what_is_locked_is_cached(tmp_path: Path, parts: tuple[ECLIP, ShardIndex, Tokenizer]) -> None:
    cache = _open(tmp_path, parts, config=dataclasses.replace(CONFIG, lock_text=False))
    assert cache.lookup(torch.zeros(1, 2, dtype=torch.long), step=0, seed=0).texts is None


def test_a_cache_is_of_what_its_tower_computes(tmp_path: Path, parts: tuple[ECLIP, ShardIndex, Tokenizer]) -> None:
    """The same weights under another activation or other pixel statistics give other features."""
    _open(tmp_path, parts)
    usual = set(tmp_path.glob("*.npy"))
    assert len(usual) == 2
    for number, changes in enumerate(({"pixel_statistics": "clip"}, {"vision_activation": "quick_gelu"})):
        model = ECLIP(dataclasses.replace(parts[0].config, **changes)).eval()
        model.load_state_dict(parts[0].state_dict())
        config = dataclasses.replace(CONFIG, model=tiny(max_positions=64, **changes))
        _open(tmp_path, (model, *parts[1:]), config=config)
        assert len(set(tmp_path.glob("images-*.npy")) - usual) == number + 1, changes
    other = dataclasses.replace(CONFIG, model=tiny(max_positions=64, text_activation="quick_gelu"))
    _open(tmp_path, parts, config=other)
    assert len(set(tmp_path.glob("texts-*.npy")) - usual) == 1
