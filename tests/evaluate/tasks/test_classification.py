"""Zero-shot classification: images without a class, the two rows that see nothing, classes out of templates."""

import numpy as np
import torch

from eclip.evaluate.tasks.classification import TEMPLATES, class_features, classify
from tests.evaluate.colours import Colours, Words, direction
from tests.evaluate.made_features import make_features


def test_images_of_unknown_class_are_left_out() -> None:
    image = torch.eye(4)[[0, 1, 1, 2]]
    table = classify(make_features(image, image), torch.eye(4), np.array([0, 1, 0, -1]), title="classes")
    assert table.counts == {"images": 3, "classes": 4}
    assert table.rows["global (image)"]["Acc@1"] == 2 / 3
    assert table.rows["chance"]["Acc@1"] == 1 / 4 and table.rows["majority class"]["Acc@1"] == 2 / 3
    nothing = classify(make_features(image, image), torch.eye(4), np.full(4, -1), title="classes")
    assert nothing == "no image of this split has a class"


def test_a_class_is_the_mean_of_its_templates() -> None:
    asked: list[str] = []

    class Listening(Words):
        def encode(self, texts: list[str], max_tokens: int = 55) -> tuple[torch.Tensor, torch.Tensor]:
            asked.extend(texts)
            return super().encode(texts, max_tokens)

    found = class_features(Colours(), Listening(), ["Red", "Blue"], max_tokens=9, device=torch.device("cpu"))
    assert asked == [template.format(name) for name in ("red", "blue") for template in TEMPLATES]
    expected = torch.stack([direction("red"), direction("blue")]) / 3**0.5
    torch.testing.assert_close(found, expected)
