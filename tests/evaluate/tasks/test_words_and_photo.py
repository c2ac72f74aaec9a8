"""Words, photos with words: which vectors are compared, whose pages are right, and who else comes first."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from eclip.evaluate.features import Features, Prompted
from eclip.evaluate.tasks.words_and_photo import (
    FIRST,
    by_words,
    distinct_titles,
    with_another_title,
    with_own_title,
)
from tests.evaluate.made_features import make_features

AXES = torch.eye(4)


def _photos(**changed: object) -> Features:
    """Two photos of products 0 and 1, by whose pixels the former is found, whatever is asked."""
    made = make_features(AXES[[0, 0]], AXES[[0, 1]], AXES[[0, 0]], products=(0, 1), sources=("customer",) * 2)
    return dataclasses.replace(made, **changed)


def _pages() -> Features:
    return make_features(AXES[:3], AXES[:3], AXES[:3], products=(0, 1, 2))


def test_words_find_by_every_vector_of_a_page() -> None:
    pages = dataclasses.replace(_pages(), instance_image=AXES[[1, 0, 2]])
    table = by_words(_photos(), pages)
    assert not isinstance(table, str)
    found = {name: row["mAP@1"] for name, row in table.rows.items()}
    assert found.pop("page: instance (image)") == 0 and found.pop("chance") == pytest.approx(1 / 3)
    assert set(found.values()) == {1.0} and table.counts == {"queries": 2, "gallery": 3}


def test_a_title_asks_once_a_product() -> None:
    photos = make_features(AXES, AXES, titles=(5, 5, 5, 6), products=(0, 0, 1, 1))
    assert distinct_titles(photos).tolist() == [0, 2, 3]


def test_own_title_and_photo_alone() -> None:
    table = with_own_title(_photos(instance_text=AXES[[0, 1]]), _pages())
    assert not isinstance(table, str)
    assert table.rows["photo: instance (image)"]["mAP@1"] == table.rows["photo: global"]["mAP@1"] == 1 / 2
    assert table.rows["both: instance (title)"]["mAP@1"] == table.rows["words: global"]["mAP@1"] == 1
    assert FIRST not in table.rows["chance"]


def test_the_title_of_another_product_asks_for_its_pages() -> None:
    """Photo 1 is prompted by product 2's title and sees it half; product 9 has no page."""
    half = F.normalize(AXES[2] + 1.5 * AXES[1], dim=-1)
    prompted = Prompted(
        rows=np.array([0, 1]), products=np.array([9, 2]), text=AXES[[3, 2]], instance=torch.stack([AXES[3], half])
    )
    photos = _photos(global_image=AXES[[0, 1]], instance_image=AXES[[0, 1]], prompted=prompted)
    table = with_another_title(photos, _pages())
    assert not isinstance(table, str) and table.counts == {"queries": 1, "gallery": 3}
    scores = {name: (row["mAP@1"], row[FIRST]) for name, row in table.rows.items()}
    assert scores["photo: instance (image)"] == scores["both: instance (title)"] == (0, 1)
    assert scores["both: instance (title) + text"] == scores["words: instance (title)"] == (1, 0)
    assert scores["chance"] == pytest.approx((1 / 3, 1 / 3))


def test_rows_without_a_decoder_and_tables_that_cannot_be() -> None:
    pages = make_features(AXES[:3], AXES[:3], products=(0, 1, 2))
    prompted = Prompted(rows=np.array([0]), products=np.array([1]), text=AXES[[1]], instance=None)
    photos = _photos(instance_image=None, instance_text=None, prompted=prompted)
    for table in (by_words(photos, pages), with_own_title(photos, pages), with_another_title(photos, pages)):
        assert not isinstance(table, str)
        assert table.rows and not [name for name in table.rows if "instance" in name]
    assert "no customer photo is known" in with_another_title(_photos(), pages)  # type: ignore[operator]
    assert with_own_title(_photos(products=np.array([7, 8])), pages) == "no query has a match among the detail pages"
