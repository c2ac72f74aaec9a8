"""What the random draws must guarantee, whatever the step, the seed and the number of ranks."""

import pytest
import torch

from eclip.objectives.draws import Draws, build_prompts, draw_prompts, draw_tokens, take_query
from eclip.objectives.settings import ObjectiveConfig
from tests.objectives.batches import DEFAULT, B, T


@pytest.mark.parametrize("step", range(5))
def test_every_query_has_its_own_product_and_the_positive_its_own(step: int) -> None:
    draw = draw_prompts(B, range(B), T, DEFAULT, seed=0, step=step)
    for row, (products, index) in enumerate(zip(draw.products, draw.positive, strict=True)):
        assert products[index] == row
        assert len(set(products.tolist())) == T


def test_ranks_draw_slices_of_one_table() -> None:
    whole = draw_prompts(8, range(8), T, DEFAULT, seed=3, step=9)
    parts = [draw_prompts(8, rows, T, DEFAULT, seed=3, step=9) for rows in (range(4), range(4, 7), range(7, 8))]
    for name in ("products", "modality", "positive", "own_image", "gaussian", "gumbel"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts]))


def test_rows_of_draws_are_the_draws_of_rows() -> None:
    whole = Draws(8, prompts=draw_prompts(16, range(8, 16), T, DEFAULT, seed=3, step=9), noise=torch.randn(T, 4))
    part = whole.rows(2, 5)
    alone = draw_prompts(16, range(10, 13), T, DEFAULT, seed=3, step=9)
    assert part.first == 10
    assert part.noise is whole.noise
    assert part.prompts is not None
    assert torch.equal(part.prompts.products, alone.products)
    assert torch.equal(part.prompts.gumbel, alone.gumbel)
    doubled = part.map(lambda x: torch.cat([x, x]))
    assert doubled.prompts is not None
    assert len(doubled.prompts.positive) == 6


def test_positive_index_and_modalities_are_spread() -> None:
    config = ObjectiveConfig(image_prompt_share=0.25, own_image_share=0.75, gaussian_share=0.4)
    draws = [draw_prompts(64, range(64), T, config, seed=0, step=step) for step in range(20)]
    counts = torch.stack([d.positive for d in draws]).flatten().bincount(minlength=T)
    assert counts.min() > 0.7 * 64 * 20 / T, "a fixed index would give L_intra's answer away"
    own = torch.cat([take_query(d.modality[..., None], d.positive) for d in draws]).float().mean()
    assert abs(own - 0.25) < 0.05
    assert abs(torch.stack([d.modality for d in draws]).float().mean() - 0.25) < 0.02
    assert abs(torch.stack([d.own_image for d in draws]).float().mean() - 0.75) < 0.05
    assert abs(torch.stack([d.gaussian for d in draws]).float().mean() - 0.4) < 0.05


def test_too_small_a_batch_names_the_way_out() -> None:
    with pytest.raises(ValueError, match=r"4 products cannot prompt 5 queries.*--global-batch-size to at least 5"):
        draw_prompts(4, range(4), 5, DEFAULT, seed=0, step=0)


def test_prompts_are_looked_up_and_only_the_positive_has_a_gradient() -> None:
    draw = draw_prompts(B, range(B), T, ObjectiveConfig(gaussian_share=0.5), seed=0, step=0)
    assert 0 < draw.gaussian.sum() < B
    texts, images, noise = torch.randn(B, 4), torch.randn(B, 4), torch.randn(T, 4)
    own_texts, own_images = texts.clone().requires_grad_(), images.clone().requires_grad_()
    prompts = build_prompts(draw, texts, images, noise, own_texts, own_images)
    for row in range(B):
        for t in range(T):
            pool = images if draw.modality[row, t] else texts
            negative = t != draw.positive[row]
            expected = noise[t] if draw.gaussian[row] and negative else pool[draw.products[row, t]]
            assert torch.equal(prompts[row, t], expected)
    prompts.sum().backward()
    used = take_query(draw.modality[..., None], draw.positive).bool()
    assert torch.equal(own_images.grad.bool(), used.expand(-1, 4))
    assert torch.equal(own_texts.grad.bool(), ~used.expand(-1, 4))


def test_kept_tokens_are_a_sorted_share_drawn_per_view_and_step() -> None:
    kept = draw_tokens(16, 0.3, seed=0, step=1)
    assert kept is not None
    first, second = kept
    assert kept.shape == (2, 5)
    assert (kept.diff() > 0).all()
    assert not torch.equal(first, second)
    later = draw_tokens(16, 0.3, seed=0, step=2)
    assert later is not None
    assert not torch.equal(first, later[0])
    assert draw_tokens(16, 1.0, seed=0, step=1) is None
