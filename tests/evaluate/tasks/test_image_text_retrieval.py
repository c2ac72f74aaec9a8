"""Image-text retrieval: a title stands in the gallery once, or once for each product that has it."""

from types import SimpleNamespace

import pytest
import torch

from eclip.evaluate.tasks import image_text_retrieval
from tests.evaluate.made_features import make_features


def test_titles_of_the_gallery() -> None:
    image = torch.eye(3)[[0, 0, 1, 2]]
    # Two images of product 0, whose second one is called like product 1's; product 2.
    features = make_features(image, torch.eye(3)[[0, 1, 1, 2]], titles=(0, 1, 1, 2), products=(0, 0, 1, 2))
    tables = dict(image_text_retrieval.run(SimpleNamespace(), SimpleNamespace(features=features)))
    own, product = tables["image_text_retrieval"], tables["image_text_retrieval_product"]
    assert list(tables) == ["image_text_retrieval", "image_text_retrieval_product"]
    assert own.counts == {"images": 4, "texts": 3} and product.counts == {"images": 4, "texts": 4}
    assert list(own.rows) == ["global", "chance"]
    assert own.rows["global"]["i2t R@1"] == 3 / 4  # image 1 looks like title 0
    assert product.rows["global"]["i2t R@5"] == 1
    assert own.rows["chance"]["i2t R@1"] == pytest.approx(1 / 3)
