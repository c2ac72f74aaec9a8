"""The batch: titles of a view without a look at the tensors, and all tensors moved together."""

import dataclasses

import pytest
import torch

from eclip.dataloading.schema import Batch, count_titles

LENGTHS = [3, 5, 4, 2, 7, 6]  # of three titles of views a, then of views b


def batch(lengths: list[int] = LENGTHS) -> Batch:
    rows = len(lengths) // 2
    ids = torch.arange(rows)
    return Batch(
        images=torch.zeros(rows, 2, 3, 4, 4, dtype=torch.uint8),
        image_rows=torch.zeros(rows, 2, dtype=torch.int64),
        tokens=torch.arange(sum(lengths)),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int(),
        product_ids=ids,
        catalog_ids=ids,
        category_ids=ids,
        title_ids=ids[:, None].expand(-1, 2),
        keys=[f"p{i}/0.jpg" for i in range(2 * rows)],
        step=3,
        epoch=0,
    )


def counted() -> Batch:
    counts, longest = count_titles(batch().cu_seqlens)
    return dataclasses.replace(batch(), token_counts=counts, longest=longest)


@pytest.mark.parametrize("made", [batch, counted])
def test_titles_of_a_view(made) -> None:
    for view, (first, lengths) in enumerate([(0, LENGTHS[:3]), (12, LENGTHS[3:])]):
        tokens, bounds, longest = made().titles(view)
        assert tokens.tolist() == list(range(first, first + sum(lengths)))
        assert bounds[0] == 0 and bounds.diff().tolist() == lengths and bounds.dtype == torch.int32
        assert longest == max(lengths) and type(longest) is int


def test_counted_titles_are_not_looked_at() -> None:
    """On the meta device no value can be read, as on a GPU none should be."""
    moved = counted().to("meta")
    for view, total, longest in ((0, 12, 5), (1, 15, 7)):
        tokens, bounds, found = moved.titles(view)
        assert tokens.shape == (total,) and bounds.shape == (4,) and found == longest
    with pytest.raises((RuntimeError, NotImplementedError)):
        batch().to("meta").titles(0)


@pytest.mark.parametrize("lengths", [[3, 0, 4, 2, 7, 6], [3, 5, 4, 2, 7, 0], []])
def test_an_empty_title_is_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="empty text"):
        batch(lengths).titles(0)


def test_all_tensors_change_together() -> None:
    whole = counted()
    changed = whole.map(lambda tensor: tensor + 1)
    for field in dataclasses.fields(Batch):
        old, new = getattr(whole, field.name), getattr(changed, field.name)
        assert torch.equal(new, old + 1) if isinstance(old, torch.Tensor) else new == old
    without = dataclasses.replace(whole, images=None).to("cpu")
    assert without.images is None and (without.token_counts, without.longest) == ((12, 15), (5, 7))


def test_without_a_gpu_nothing_is_pinned(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    whole = counted()
    assert whole.pinned() is whole


@pytest.mark.gpu
def test_pinned_batch() -> None:
    on_gpu = dataclasses.replace(counted(), images=counted().images.cuda())
    pinned = on_gpu.pinned()
    assert pinned.images is on_gpu.images
    for field in dataclasses.fields(Batch):
        value = getattr(pinned, field.name)
        if isinstance(value, torch.Tensor):
            assert value.is_cuda or value.is_pinned(), field.name
            assert torch.equal(value, getattr(on_gpu, field.name))
    assert pinned.pinned().tokens is pinned.tokens
