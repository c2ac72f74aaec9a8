"""Rows to products: the first row's facts, contradictions, repetitions."""

from eclip.dataloading.errors import Rejection
from eclip.dataloading.packing.drafts import gather, to_sample
from eclip.dataloading.tables.table import Row


def row(number: int, product: str = "P1", images: str = "a.jpg", title: str = "Chair", category: str = "Chairs") -> Row:
    return Row(
        number=number, product=product, title=title, category=category, images=tuple(images.split()), sku=product,
        source="detail", catalog=product, titles={}, attributes={},
    )  # fmt: skip


def test_rows_of_a_product_need_not_stand_together() -> None:
    rejected: list[Rejection] = []
    drafts = gather([row(1), row(2, "P2"), row(3, images="b.jpg", title="Red chair")], "t.csv", rejected)
    assert [draft.paths for draft in drafts] == [["a.jpg", "b.jpg"], ["a.jpg"]] and not rejected
    assert drafts[0].product.title == "Chair" and [title for *_, title in drafts[0].images] == ["Chair", "Red chair"]


def test_repeated_rows_are_listed_and_used_once() -> None:
    """A table put together of two exports."""
    rejected: list[Rejection] = []
    rows = [row(1, images="a.jpg b.jpg"), row(2), row(3, images="b.jpg c.jpg"), row(4, title="Other"), row(5, "P2")]
    drafts = gather([*rows, row(6, images="a.jpg b.jpg")], "t.csv", rejected)
    assert [draft.paths for draft in drafts] == [["a.jpg", "b.jpg", "c.jpg", "a.jpg"], ["a.jpg"]]
    assert [found.where for found in rejected] == ["t.csv, row 2", "t.csv, row 6"]
    assert {found.reason for found in rejected} == {"repeats images of the product's earlier rows, with the same facts"}


def test_another_category_rejects_its_row() -> None:
    rejected: list[Rejection] = []
    (draft,) = gather([row(1), row(2, images="b.jpg", category="Tables")], "t.csv", rejected)
    assert draft.paths == ["a.jpg"] and rejected[0].detail == "'Tables' instead of 'Chairs'"


def test_ids_that_no_key_can_be_get_different_keys() -> None:
    ids = ["Ref. 1", "Ref/1", "ref. 1", "Ref  1", "椅子", "椅", "x" * 81, "x" * 82, "-", ".", "a.b", "a-b"]
    keys = [draft.product.key for draft in gather([row(n, name) for n, name in enumerate(ids)], "t.csv", [])]
    assert len(set(keys)) == len(ids) and keys[-1] == "a-b" and all(len(key) <= 80 for key in keys)


def test_images_that_cannot_be_used_leave_the_others() -> None:
    (draft,) = gather([row(1, images="a.jpg b.jpg c.jpg")], "t.csv", [])
    bad = Rejection(kind="image", where="b.jpg", reason="truncated")
    rejected: list[Rejection] = []
    sample = to_sample(draft, [(b"a", 40, 50), bad, (b"c", 60, 70)], rejected)
    assert sample is not None and rejected == [bad] and sample[1] == [b"a", b"c"]
    assert [(image.file, image.width) for image in sample[0].images] == [("000.jpg", 40), ("001.jpg", 60)]
    assert to_sample(draft, [bad, bad, bad], rejected) is None and rejected[-1].kind == "product"
