"""The decoder and the head asked one by one give what training and `Objective.embed` give."""

import pytest
import torch
import torch.nn.functional as F

from eclip.evaluate.prompting import decode_by_text, match_odds, trains_head
from eclip.model.eclip import ECLIP, ImageFeatures
from eclip.model.settings import ModelConfig
from eclip.objectives.objective import make_objective
from eclip.objectives.settings import ObjectiveConfig


@pytest.fixture(scope="module")
def model() -> ECLIP:
    torch.manual_seed(0)
    config = ModelConfig(
        image_size=32, patch_size=16, vision_width=32, vision_depth=1, vision_heads=2, text_width=32, text_depth=1,
        text_heads=2, vocab_size=50, embed_dim=24, num_queries=3, decoder_depth=1, decoder_heads=2,
    )  # fmt: skip
    return ECLIP(config).eval()


def test_decoding_by_text_is_the_stored_instance(model: ECLIP) -> None:
    image, text = ImageFeatures(torch.randn(5, 24), torch.randn(5, 4, 24)), torch.randn(5, 24)
    with torch.inference_mode():
        stored = make_objective(ObjectiveConfig()).embed(model, image, text)["instance_text"]
    torch.testing.assert_close(decode_by_text(model, image.tokens, text), stored)


def test_odds_are_of_unit_vectors_times_the_width_as_in_training(model: ECLIP) -> None:
    one, other = F.normalize(torch.randn(2, 6, 24), dim=-1)
    with torch.no_grad():
        expected = model.match(one * other * 24).log_softmax(-1)
    odds = match_odds(model, one, other, device=torch.device("cpu"))
    torch.testing.assert_close(odds, expected[:, 1] - expected[:, 0])
    against_one = match_odds(model, one, other[0], device=torch.device("cpu"))
    torch.testing.assert_close(against_one[0], odds[0])
    torch.testing.assert_close(match_odds(model, other[0], one, device=torch.device("cpu")), against_one)


def test_which_runs_train_the_head() -> None:
    assert trains_head(ObjectiveConfig()) and trains_head(ObjectiveConfig(decoder_warmup_steps=1000))
    assert not trains_head(ObjectiveConfig(itm_weight=0.0)) and not trains_head(ObjectiveConfig(objective="clip"))
