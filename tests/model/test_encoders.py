"""What the two encoders accept and promise beyond the weights they load."""

import pytest
import torch

from eclip.model.image_encoder import ImageEncoder
from eclip.model.text_encoder import TextEncoder
from tests.model.tiny import tiny


@pytest.mark.parametrize("statistics", ["imagenet", "half"])
@torch.no_grad()
def test_bytes_are_normalised(statistics):
    mean, std = {"imagenet": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]), "half": ([0.5] * 3, [0.5] * 3)}[statistics]
    encoder = ImageEncoder(tiny(pixel_statistics=statistics))
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    floats = (images / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(encoder(images), encoder(floats))
    assert encoder(images).shape == (2, 1 + 16, 32)


@torch.no_grad()
def test_tokens_are_in_row_order():
    """Without positions and blocks, a token depends on its own patch alone."""
    encoder = ImageEncoder(tiny())
    encoder.blocks = torch.nn.ModuleList()
    encoder.pos_embed.zero_()
    images = torch.zeros(1, 3, 32, 32)
    images[:, :, 8:16, 24:32] = 1.0  # second row of patches, last column: patch 1 * 4 + 3
    tokens = encoder(images)[0, 1:]
    differs = [i for i in range(16) if not torch.allclose(tokens[i], tokens[0])]
    assert differs == [7]


@torch.no_grad()
def test_kept_patches_alone_go_through_the_blocks():
    """They keep their positions, and the others are as if they had never been."""
    encoder = ImageEncoder(tiny()).double()
    images, kept = torch.randn(2, 3, 32, 32, dtype=torch.float64), torch.tensor([1, 6, 7, 15])
    x = encoder.patch_embed(images) + encoder.pos_embed[:, 1:]
    x = torch.cat([(encoder.cls_token + encoder.pos_embed[:, :1]).expand(2, -1, -1), x[:, kept]], dim=1)
    for block in encoder.blocks:
        x = block(x)
    torch.testing.assert_close(encoder(images, kept), encoder.norm(x))
    assert torch.equal(encoder(images, torch.arange(16)), encoder(images))
    rest = [i for i in range(16) if i not in kept]
    for patch in rest:
        row, column = 8 * (patch // 4), 8 * (patch % 4)
        images[:, :, row : row + 8, column : column + 8] = torch.nan
    assert encoder(images, kept).isfinite().all()


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"\(1, 3, 40, 40\).*\(B, 3, 32, 32\).*--model.image-size"):
        ImageEncoder(tiny())(torch.zeros(1, 3, 40, 40))


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@torch.no_grad()
def test_a_text_does_not_depend_on_its_neighbours(pooling):
    encoder = TextEncoder(tiny(text_pooling=pooling))
    tokens = torch.randint(50, (12,))
    together = encoder(tokens, torch.tensor([0, 3, 4, 12], dtype=torch.int32))
    alone = [encoder(tokens[a:b], torch.tensor([0, b - a], dtype=torch.int32)) for a, b in ((0, 3), (3, 4), (4, 12))]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-5)


def test_texts_longer_than_the_positions_are_refused():
    with pytest.raises(ValueError, match=r"17 tokens.*max_positions=16.*--data.max-tokens"):
        TextEncoder(tiny())(torch.zeros(17, dtype=torch.long), torch.tensor([0, 17]))


def test_every_parameter_of_both_encoders_gets_a_gradient():
    image, text = ImageEncoder(tiny(layer_scale=True)), TextEncoder(tiny(text_pooling="mean"))
    (image(torch.randn(1, 3, 32, 32)) * torch.randn(1, 17, 32)).sum().backward()
    (text(torch.arange(16), torch.tensor([0, 16])) * torch.randn(1, 24)).sum().backward()
    for encoder in (image, text):
        assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())
