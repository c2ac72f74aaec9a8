"""Product retrieval: who asks, what is found, and why there may be no table."""

import numpy as np
import pytest
import torch

from eclip.evaluate.tasks.product_retrieval import product_retrieval
from tests.evaluate.made_features import make_features


def test_customer_photos_ask_and_detail_pages_answer() -> None:
    image = torch.eye(3)[[0, 1, 1, 0, 1, 2]]
    sources = ("customer", "customer", "customer", "detail", "detail", "ad")
    features = make_features(image, image, products=(0, 1, 9, 0, 1, 9), sources=sources)
    table = product_retrieval(features, features.products, title="products")
    assert table.counts == {"queries": 2, "gallery": 2}  # product 9 has no page
    assert table.rows["global (image)"]["mAP@1"] == 1 and table.rows["chance"]["mAP@1"] == 1 / 2
    keep = np.array([True, False, False, False, False, False])
    assert product_retrieval(features, features.products, title="one", keep=keep).counts == {"queries": 1, "gallery": 2}


@pytest.mark.parametrize(
    ("sources", "reason"),
    [
        (("detail", "ad"), "no customer photos to ask with in this split"),
        (("customer", "ad"), "no detail pages to find in this split"),
        (("customer", "detail"), "no query has a match among the detail pages"),
    ],
)
def test_a_table_that_cannot_be_is_a_reason(sources: tuple[str, str], reason: str) -> None:
    features = make_features(torch.eye(2), torch.eye(2), sources=sources)
    assert product_retrieval(features, features.products, title="products") == reason
