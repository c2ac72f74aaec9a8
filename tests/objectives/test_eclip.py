"""The losses against formulas written out here, and what their random draws must guarantee."""

import dataclasses
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import eclip.objectives.contrast
from eclip.dataloading.schema import Batch
from eclip.kernels.contrastive import contrastive_loss
from eclip.model.eclip import ECLIP
from eclip.objectives.contrast import contrast, unit
from eclip.objectives.draws import build_prompts, draw_prompts, draw_tokens, take_query
from eclip.objectives.eclip import compute_losses
from eclip.objectives.intra_product import intra_product_loss
from eclip.objectives.matching import matching_loss
from eclip.objectives.settings import ObjectiveConfig
from eclip.objectives.views import CachedFeatures
from eclip.training.momentum import make_momentum
from tests.model.tiny import TINY

B, T = 7, TINY.num_queries
DEFAULT = ObjectiveConfig()


@pytest.fixture
def model() -> ECLIP:
    torch.manual_seed(0)
    return ECLIP(TINY)


def _batch(**changes: torch.Tensor) -> Batch:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(2, 9, (2 * B,), generator=generator)
    bounds = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]).int()
    facts = {
        "images": torch.randint(0, 256, (B, 2, 3, 32, 32), generator=generator, dtype=torch.uint8),
        "image_rows": torch.arange(2 * B).reshape(B, 2),
        "tokens": torch.randint(5, 50, (int(lengths.sum()),), generator=generator),
        "cu_seqlens": bounds,
        "product_ids": torch.arange(B),
        "catalog_ids": torch.arange(B) // 2,
        "category_ids": torch.zeros(B, dtype=torch.long),
        "title_ids": torch.arange(2 * B).reshape(B, 2),
    }
    return Batch(**{**facts, **changes}, keys=[f"k{i}" for i in range(2 * B)], step=0, epoch=0)


def _losses(model: ECLIP, batch: Batch, config: ObjectiveConfig = DEFAULT, **where: Any) -> dict[str, torch.Tensor]:
    return compute_losses(model, make_momentum(model), batch, config, **{"step": 3, "seed": 5, **where})


@pytest.mark.parametrize("step", range(5))
def test_every_query_has_its_own_product_and_the_positive_its_own(step: int) -> None:
    draw = draw_prompts(B, T, DEFAULT, seed=0, step=step)
    for row, (products, index) in enumerate(zip(draw.products, draw.positive, strict=True)):
        assert products[index] == row
        assert len(set(products.tolist())) == T


def test_ranks_draw_slices_of_one_table() -> None:
    whole = draw_prompts(8, T, DEFAULT, seed=3, step=9)
    parts = [draw_prompts(4, T, DEFAULT, seed=3, step=9, rank=rank, world_size=2) for rank in (0, 1)]
    for name in ("products", "modality", "positive", "own_image", "gaussian"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts]))


def test_positive_index_and_modalities_are_spread() -> None:
    config = ObjectiveConfig(image_prompt_share=0.25, own_image_share=0.75, gaussian_share=0.4)
    draws = [draw_prompts(64, T, config, seed=0, step=step) for step in range(20)]
    counts = torch.stack([d.positive for d in draws]).flatten().bincount(minlength=T)
    assert counts.min() > 0.7 * 64 * 20 / T, "a fixed index would give L_intra's answer away"
    own = torch.cat([take_query(d.modality[..., None], d.positive) for d in draws]).float().mean()
    assert abs(own - 0.25) < 0.05
    assert abs(torch.stack([d.modality for d in draws]).float().mean() - 0.25) < 0.02
    assert abs(torch.stack([d.own_image for d in draws]).float().mean() - 0.75) < 0.05
    assert abs(torch.stack([d.gaussian for d in draws]).float().mean() - 0.4) < 0.05


def test_too_small_a_batch_names_the_way_out() -> None:
    with pytest.raises(ValueError, match=r"4 products cannot prompt 5 queries.*--global-batch-size to at least 5"):
        draw_prompts(4, 5, DEFAULT, seed=0, step=0)


def test_prompts_are_looked_up_and_only_the_positive_has_a_gradient() -> None:
    draw = draw_prompts(B, T, ObjectiveConfig(gaussian_share=0.5), seed=0, step=0)
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


def test_intra_product_loss_against_its_formula() -> None:
    slots, texts, positive = torch.randn(B, T, 6), torch.randn(B, 6), torch.randint(T, (B,))
    excluded = torch.rand(B, T) < 0.3
    excluded[torch.arange(B), positive] = False
    expected = 0.0
    for b in range(B):
        terms = [
            torch.exp(F.cosine_similarity(slots[b, t], texts[b], dim=0) / 0.2) for t in range(T) if not excluded[b, t]
        ]
        own = torch.exp(F.cosine_similarity(slots[b, positive[b]], texts[b], dim=0) / 0.2)
        expected -= torch.log(own / sum(terms)) / B
    torch.testing.assert_close(intra_product_loss(slots, texts, positive, excluded, 0.2), expected)


def test_matching_loss_prefers_hard_titles(model: ECLIP) -> None:
    """With one title far closer than the others, it is the negative that is drawn."""
    draw = draw_prompts(B, T, DEFAULT, seed=0, step=0)
    instances = F.normalize(torch.randn(B, 16), dim=-1)
    pool = -instances.roll(1, 0)
    hard = draw.products[torch.arange(B), (draw.positive + 1) % T]
    with torch.no_grad():
        model.logit_scale.fill_(10)  # clamped at 100
        loss = matching_loss(
            model, instances[:1], pool[:1], pool.index_copy(0, hard[:1], instances[:1]),
            dataclasses.replace(draw, products=draw.products[:1], positive=draw.positive[:1]),
            torch.zeros(1, T, dtype=torch.bool), seed=0, step=0,
        )  # fmt: skip
        matched = model.match(F.normalize(instances[:1], dim=-1) * F.normalize(pool[:1], dim=-1) * 16)
        unmatched = model.match(instances[:1] ** 2 * 16)
        expected = (
            F.cross_entropy(matched, torch.ones(1).long()) + F.cross_entropy(unmatched, torch.zeros(1).long())
        ) / 2
    torch.testing.assert_close(loss, expected)


def test_loss_is_the_weighted_sum_with_a_warm_up(model: ECLIP) -> None:
    config = ObjectiveConfig(
        itc_weight=2, inter_weight=3, itm_weight=5, intra_weight=7, entropy_weight=11, decoder_warmup_steps=8
    )
    losses = _losses(model, _batch(), config)
    terms = 3 * losses["inter"] + 5 * losses["itm"] + 7 * losses["intra"] + 11 * losses["entropy"]
    torch.testing.assert_close(losses["loss"], 2 * losses["itc"] + 4 / 8 * terms)


def test_clip_is_itc_alone_and_equals_eclips_itc(model: ECLIP) -> None:
    losses = compute_losses(model, None, _batch(), ObjectiveConfig(objective="clip"), step=0, seed=0)
    assert set(losses) == {"loss", "itc"}
    torch.testing.assert_close(losses["itc"], _losses(model, _batch())["itc"])


@pytest.mark.parametrize("soft_labels", ["none", "title", "catalog"])
def test_image_text_loss_against_the_label_matrix(model: ECLIP, soft_labels: str) -> None:
    titles = torch.arange(2 * B).reshape(B, 2)
    titles[3, 0] = titles[5, 0]
    batch = _batch(title_ids=titles)
    config = ObjectiveConfig(objective="clip", soft_labels=soft_labels)
    got = compute_losses(model, None, batch, config, step=0, seed=0)["itc"]
    ids = {"none": torch.arange(B), "title": titles[:, 0], "catalog": batch.catalog_ids}[soft_labels]
    labels = (ids[:, None] == ids[None, :]).float()
    labels /= labels.sum(1, keepdim=True)
    images = F.normalize(model.encode_image(batch.images[:, 0]).cls, dim=-1)
    last = int(batch.cu_seqlens[B])
    texts = F.normalize(model.encode_text(batch.tokens[:last], batch.cu_seqlens[: B + 1]), dim=-1)
    scores = images @ texts.T / 0.07
    expected = (F.cross_entropy(scores, labels) + F.cross_entropy(scores.T, labels)) / 2
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_inter_product_loss_ignores_the_same_product(model: ECLIP) -> None:
    """A second image of a product is no negative: changing it leaves the other rows' loss to themselves."""
    twins = torch.arange(B)
    twins[1] = 0
    apart, together = (_losses(model, _batch(product_ids=ids))["inter"] for ids in (torch.arange(B), twins))
    assert together < apart


def test_an_own_image_prompt_has_no_gradient_of_its_own(model: ECLIP) -> None:
    """With every prompt an image, titles do not enter L_inter and the choice of own or other image does."""
    config = ObjectiveConfig(image_prompt_share=1.0)
    other, own = (_losses(model, _batch(), dataclasses.replace(config, own_image_share=share)) for share in (0.0, 1.0))
    assert not torch.equal(other["inter"], own["inter"])
    assert torch.equal(other["itc"], own["itc"])


def test_gradients_reach_every_trained_part(model: ECLIP) -> None:
    _losses(model, _batch())["loss"].backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_cached_features_give_the_same_losses(model: ECLIP) -> None:
    batch = _batch()
    images = model.image_tower(batch.images.flatten(0, 1)).unflatten(0, (B, 2))
    texts = model.text_tower(batch.tokens, batch.cu_seqlens).unflatten(0, (2, B)).transpose(0, 1)
    momentum = make_momentum(model)
    cached = compute_losses(
        model, momentum, batch, ObjectiveConfig(), features=CachedFeatures(images, texts), step=3, seed=5
    )
    for name, value in _losses(model, batch).items():
        torch.testing.assert_close(cached[name], value)


def test_draws_follow_the_step_and_the_seed(model: ECLIP) -> None:
    batch = _batch()
    one, again = _losses(model, batch), _losses(model, batch)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["intra"], _losses(model, batch, step=4)["intra"])
    assert not torch.equal(one["intra"], _losses(model, batch, seed=6)["intra"])


def test_reference_kernels_give_the_same_losses(model: ECLIP) -> None:
    losses = _losses(model, _batch())
    reference = ECLIP(dataclasses.replace(TINY, kernels="reference"))
    reference.load_state_dict(model.state_dict())
    for name, value in _losses(reference, _batch()).items():
        torch.testing.assert_close(losses[name], value, rtol=1e-4, atol=1e-5)


def test_ranks_know_each_others_rows(model: ECLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both contrastive losses say how many rows each rank has, so that the ranks need not ask."""
    known = []

    def loss(*features: torch.Tensor, **options: Any) -> torch.Tensor:
        known.append(options["rows_per_rank"])
        return contrastive_loss(*features, **options)

    monkeypatch.setattr(eclip.objectives.contrast, "contrastive_loss", loss)
    alone = _losses(model, _batch())
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        grouped = _losses(model, _batch(), group=dist.group.WORLD)
    finally:
        dist.destroy_process_group()
    assert known == [None, None, (B,), (B,)]
    assert all(torch.equal(alone[name], grouped[name]) for name in alone)


def test_losses_under_autocast(model: ECLIP) -> None:
    """Float32 scalars near those without it, and a gradient for the temperature."""
    exact = _losses(model, _batch())
    with torch.autocast("cpu", torch.bfloat16):
        losses = _losses(model, _batch())
    for name, value in losses.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, exact[name], rtol=0.03, atol=0.03)
    losses["itc"].backward()
    assert model.logit_scale.grad is not None and model.logit_scale.grad.isfinite().all()


def _intra(model: ECLIP, slots: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    excluded = torch.zeros(slots.shape[:2], dtype=torch.bool)
    return intra_product_loss(slots, texts, torch.arange(len(slots)) % T, excluded, 0.02)


def _matching(model: ECLIP, slots: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    draw = draw_prompts(len(texts), T, DEFAULT, seed=0, step=0)
    excluded = torch.zeros(slots.shape[:2], dtype=torch.bool)
    return matching_loss(model, slots[:, 0], texts, texts, draw, excluded, seed=0, step=0)


def _contrastive(model: ECLIP, slots: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    return contrast(model, unit(slots[:, 0]), unit(texts), torch.tensor(100.0), None)


# Not the contrastive kernels: they take autocast's dtype for their operands, on purpose.
@pytest.mark.parametrize(
    ("loss", "kernels"),
    [
        (_intra, "auto"),
        (_intra, "reference"),
        (_matching, "auto"),
        (_matching, "reference"),
        (_contrastive, "reference"),
    ],
)
def test_products_of_the_losses_are_float32_under_autocast(loss: Any, kernels: str) -> None:
    """Values and gradients are those without autocast: bfloat16 would change the third digit."""
    torch.manual_seed(0)
    model = ECLIP(dataclasses.replace(TINY, kernels=kernels))
    model.matching_head.weight.data.mul_(20)
    rows = torch.randn(16, T, TINY.embed_dim), torch.randn(16, TINY.embed_dim)
    found = []
    for autocast in (True, False):
        inputs = [x.clone().requires_grad_() for x in rows]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            value = loss(model, *inputs)
        value.backward()
        found.append((value, *(x.grad for x in inputs)))
    for cast, plain in zip(*found, strict=True):
        assert cast.dtype == torch.float32
        torch.testing.assert_close(cast, plain, rtol=1e-6, atol=1e-7)
    if loss is _intra:
        slots, texts = (F.normalize(x.double(), dim=-1) for x in rows)
        exact = F.cross_entropy(torch.einsum("btd,bd->bt", slots, texts) / 0.02, torch.arange(16) % T)
        assert found[0][0].item() == pytest.approx(exact.item(), rel=1e-6)


def test_kept_tokens_are_a_sorted_share_drawn_per_view_and_step() -> None:
    first, second = draw_tokens(16, 0.3, seed=0, step=1)
    for kept in (first, second):
        assert len(kept) == 5
        assert (kept.diff() > 0).all()
    assert not torch.equal(first, second)
    assert not torch.equal(first, draw_tokens(16, 0.3, seed=0, step=2)[0])
    assert torch.equal(draw_tokens(16, 1.0, seed=0, step=1)[0], torch.arange(16))


def test_dropped_tokens_take_no_part_but_cls_does(model: ECLIP) -> None:
    """The losses see only the kept tokens: others may be anything. CLS always counts."""
    config = ObjectiveConfig(token_keep=0.4)
    batch, momentum = _batch(), make_momentum(model)
    images = model.image_tower(batch.images.flatten(0, 1)).unflatten(0, (B, 2)).detach()
    kept = draw_tokens(16, 0.4, seed=5, step=3)
    changed = images.clone()
    for view in (0, 1):
        dropped = torch.ones(17, dtype=torch.bool)
        dropped[torch.cat([torch.zeros(1, dtype=torch.long), kept[view] + 1])] = False
        changed[:, view, dropped] = 100.0
    one, two = (
        compute_losses(model, momentum, batch, config, features=CachedFeatures(x, None), step=3, seed=5)
        for x in (images, changed)
    )
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert torch.equal(one["itc"], _losses(model, batch)["itc"])
