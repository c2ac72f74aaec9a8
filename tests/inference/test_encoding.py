"""One pass of the tower and many prompts give what evaluation gives, image for image."""

import pytest
import torch
import torch.nn.functional as F

from eclip.dataloading.text import Tokenizer
from eclip.inference import Encoder, TrainedModel
from eclip.inference.encoding import IMAGE, TEXT
from eclip.objectives.eclip import EclipObjective
from eclip.objectives.settings import ObjectiveConfig


@pytest.fixture(scope="module")
def encoder(model: TrainedModel) -> Encoder:
    return model.encoder


def squares(encoder: Encoder, count: int) -> torch.Tensor:
    shape = (count, 3, encoder.image_size, encoder.image_size)
    return torch.randint(0, 255, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_embeddings_and_maps_are_those_of_evaluation(encoder: Encoder) -> None:
    images = encoder.images(squares(encoder, 3), [(40, 40)] * 3)
    texts = encoder.texts(["red sofa", "green bed", "a lamp"])
    with torch.inference_mode():
        told = EclipObjective(ObjectiveConfig()).embed(encoder.model, images.features, texts)
    assert torch.equal(images.vectors, told["global_image"])
    by_text, by_image = encoder.instances(images, texts, TEXT), encoder.instances(images, images.features.cls, IMAGE)
    torch.testing.assert_close(by_text.vectors, told["instance_text"])
    torch.testing.assert_close(by_text.maps, told["instance_map"])
    torch.testing.assert_close(by_image.vectors, told["instance_image"])
    torch.testing.assert_close(encoder.cosine_maps(images, texts), told["global_map"])


def test_one_image_asked_with_many_prompts(encoder: Encoder) -> None:
    square, texts = squares(encoder, 1), torch.randn(3, encoder.embed_dim)
    many = encoder.instances(encoder.images(square.expand(3, -1, -1, -1), [(20, 10)] * 3), texts, TEXT)
    for i in range(3):
        alone = encoder.instances(encoder.images(square, [(20, 10)]), texts[i : i + 1], TEXT)
        torch.testing.assert_close(many.vectors[i], alone.vectors[0])
    assert not torch.allclose(many.maps[0], many.maps[1], atol=1e-3)  # the prompt matters


def test_the_matching_head_sees_what_it_was_trained_on(encoder: Encoder) -> None:
    width = encoder.embed_dim
    h, w = torch.randn(4, width), torch.randn(4, width)
    logits = encoder.model.matching_head(F.normalize(h, dim=-1) * F.normalize(w, dim=-1) * width)
    torch.testing.assert_close(encoder.match(3 * h, 7 * w), logits.softmax(-1)[:, 1].detach())


def test_a_fingerprint_is_of_weights_and_vocabulary(encoder: Encoder) -> None:
    def again(tokenizer: Tokenizer = encoder.tokenizer) -> Encoder:
        return Encoder(encoder.model, tokenizer, max_tokens=encoder.max_tokens, trains_decoder=True)

    assert again().fingerprint == encoder.fingerprint and len(encoder.fingerprint) == 64
    with torch.no_grad():
        encoder.model.image_projection.bias[0] += 1
        changed = again().fingerprint
        encoder.model.image_projection.bias[0] -= 1
    assert changed != encoder.fingerprint
    sofas, lamps = (Tokenizer.train([word], 64) for word in ("abcd", "wxyz"))
    assert sofas.vocab_size == lamps.vocab_size and again(sofas).fingerprint != again(lamps).fingerprint


def test_without_a_decoder_there_is_no_instance(encoder: Encoder) -> None:
    plain = Encoder(encoder.model, encoder.tokenizer, max_tokens=encoder.max_tokens, trains_decoder=False)
    images = plain.images(squares(encoder, 1), [(40, 40)])
    for ask in (
        lambda: plain.instances(images, images.features.cls, IMAGE),
        lambda: plain.match(images.vectors, images.vectors),
    ):
        with pytest.raises(ValueError, match="--objective clip"):
            ask()
    assert plain.cosine_maps(images, images.features.cls).shape == (1, images.features.tokens.shape[1])
