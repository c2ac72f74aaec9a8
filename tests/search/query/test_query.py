"""Questions that mean nothing are refused in one line, before anything is opened."""

import math
from pathlib import Path
from typing import Any

import pytest

from eclip.search.query import Filters, Query, Searcher
from tests.dataloading.fixtures import jpeg

PHOTO = jpeg(3, 80, 60)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({}, "nothing is asked"),
        ({"words": " \t\n"}, "are blank"),
        ({"words": "", "image": PHOTO}, "are blank"),
        ({"words": "x", "box": (0, 0, 1, 1)}, "without a photo"),
        ({"words": "x", "limit": 0}, "limit=0"),
        ({"words": "x", "limit": 20, "rerank": 10}, "at least limit=20"),
        ({"words": "x", "rerank": -1}, "rerank=-1"),
        ({"image": PHOTO, "rerank": 50}, "rerank without words"),
        ({"image": PHOTO, "hybrid": True}, "hybrid without words"),
        ({"image": PHOTO, "locate": True}, "locate without words"),
    ],
)
def test_a_question_that_means_nothing(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Query(**asked)


@pytest.mark.parametrize(
    ("filters", "said"),
    [
        ({"category": " "}, "category=' ' is blank"),
        ({"source": ""}, "source='' is blank"),
        ({"attributes": {" ": "x"}}, "its name is blank"),
        ({"price_min": math.nan}, "finite"),
        ({"price_max": math.inf}, "finite"),
        ({"price_min": 2, "price_max": 1}, "no price lies there"),
    ],
)
def test_filters_that_mean_nothing(filters: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Filters(**filters)


@pytest.mark.parametrize(
    ("image", "box", "said"),
    [
        (b"no picture", None, r"photo \(10 bytes\)"),
        (b"", None, r"photo \(0 bytes\)"),
        (Path("not there.jpg"), None, r"photo \(not there.jpg\)"),
        (3, None, r"photo \(a int\)"),
        (PHOTO, (80, 0, 99, 60), "less than a pixel of it lies in the image of 80 x 60"),
        (PHOTO, (81, 0, 99, 60), "less than a pixel of it lies in the image of 80 x 60"),
        (PHOTO, (9, 9, 9, 20), "x0 < x1"),
        (PHOTO, (0, 0, math.nan, 1), "four numbers"),
    ],
)
def test_a_photo_that_cannot_be_asked_with(searcher: Searcher, image: Any, box: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said) as error:
        searcher.prepare(Query(image=image, box=box))
    assert "\n" not in str(error.value)
