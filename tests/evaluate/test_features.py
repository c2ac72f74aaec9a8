"""Features of images: some of them, and the rows that tables have."""

import numpy as np
import torch
import torch.nn.functional as F

from tests.evaluate.made_features import make_features


def test_select_keeps_what_belongs_together() -> None:
    image, text, instance = F.normalize(torch.randn(3, 4, 8), dim=-1)
    features = make_features(image, text, instance, titles=(5, 6, 7, 8), sources=("ad", "ad", "detail", "customer"))
    for keep in (np.array([False, True, False, True]), np.array([1, 3])):
        chosen = features.select(keep)
        assert len(chosen) == 2 and chosen.rows.tolist() == [1, 3] and chosen.titles.tolist() == [6, 8]
        assert chosen.sources.tolist() == ["ad", "customer"] and chosen.instance_map is None
        assert torch.equal(chosen.global_image, image[[1, 3]]) and torch.equal(chosen.text, text[[1, 3]])


def test_rows_of_a_run_with_and_without_a_decoder() -> None:
    image, text, instance = F.normalize(torch.randn(3, 4, 8), dim=-1)
    with_decoder, without = make_features(image, text, instance), make_features(image, text)
    assert list(without.embeddings()) == ["global (image)", "global (image+text)", "text only"]
    assert list(without.image_embeddings()) == ["global"]
    assert list(with_decoder.image_embeddings()) == ["instance", "global"]
    assert torch.equal(with_decoder.image_embeddings()["instance"], instance)
    for name, embedding in with_decoder.embeddings().items():
        torch.testing.assert_close(embedding.norm(dim=-1), torch.ones(4), msg=name)
    both = with_decoder.embeddings()["instance + text"]
    torch.testing.assert_close(both, F.normalize(instance + text, dim=-1))
