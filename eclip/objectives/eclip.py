"""The five losses of ECLIP (arXiv 2304.02853, section 3) and e-CLIP's soft labels (arXiv 2207.00208).

    L_itc    symmetric InfoNCE between g_I(v_cls) and g_T(w_cls)
    L_inter  InfoNCE between the positive query's output on image a and the momentum model's on image b of the product
    L_itm    binary matching of the instance embedding with its title and with a hard title of the batch
    L_intra  per image, cross-entropy over the T query outputs: which of them is what the title speaks of
    L_R      entropy of the assignment of image tokens to queries

Every random draw (negative prompts, modalities, the positive's index) is a function of (seed, step) over the GLOBAL
batch, so that losses do not depend on the number of ranks. Every loss is this rank's share; their mean is exact.

Letters: B products of this rank, G of the global batch, T queries, N image tokens, D embedding width.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from eclip.config import ObjectiveConfig
from eclip.dataloading.schema import Batch
from eclip.kernels.contrastive import contrastive_loss, contrastive_loss_reference
from eclip.model.eclip import ECLIP, ImageFeatures
from eclip.parallel.gather import gather_rows

_PROMPTS, _GAUSSIAN, _MATCHING, _TOKENS = range(4)


def _generator(seed: int, step: int, stream: int) -> torch.Generator:
    """The random numbers of one purpose at one step, on every rank the same."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step + stream * 250_000_000) & 0x7FFF_FFFF_FFFF_FFFF)


@dataclass(frozen=True)
class CachedFeatures:
    """Outputs of locked towers. images: (B, 2, 1+N, width) or None; texts: (B, 2, text width) or None."""

    images: Tensor | None
    texts: Tensor | None


@dataclass(frozen=True)
class PromptDraw:
    """Which product prompts which query, for this rank's rows."""

    products: Tensor
    """(B, T) int64 rows of the global batch; the product itself stands at `positive`."""
    modality: Tensor
    """(B, T) int64, 0 = title, 1 = image."""
    positive: Tensor
    """(B,) int64 index of the positive query."""
    own_image: Tensor
    """(B,) bool: a positive image prompt is the image itself, as at inference, and not the product's other image."""
    gaussian: Tensor
    """(B,) bool: the negative prompts are N(0, I), as at inference, instead of those of other products."""

    def to(self, device: torch.device) -> "PromptDraw":
        return PromptDraw(*(getattr(self, f.name).to(device) for f in dataclasses.fields(self)))


def draw_prompts(
    local: int,
    num_queries: int,
    config: ObjectiveConfig,
    *,
    seed: int,
    step: int,
    rank: int = 0,
    world_size: int = 1,
) -> PromptDraw:
    """Draw the prompts of `local` rows out of local * world_size; every rank draws the same global table.

    The positive's index is random: at a fixed one its position embedding gives L_intra's answer away. The T-1 negatives
    follow the product in a random ring of the batch: distinct, never the product itself, O(G T) to draw.
    """
    total = local * world_size
    if total < num_queries:
        raise ValueError(
            f"a global batch of {total} products cannot prompt {num_queries} queries with distinct products; "
            f"raise --global-batch-size to at least {num_queries} or lower --num-queries"
        )
    generator = _generator(seed, step, _PROMPTS)
    ring = torch.randperm(total, generator=generator)
    place = torch.empty_like(ring).scatter_(0, ring, torch.arange(total))
    modality = (torch.rand(total, num_queries, generator=generator) < config.image_prompt_share).long()
    positive = torch.randint(num_queries, (total,), generator=generator)
    own_image = torch.rand(total, generator=generator) < config.own_image_share
    gaussian = torch.rand(total, generator=generator) < config.gaussian_share
    rows = torch.arange(rank * local, (rank + 1) * local)
    column = torch.arange(num_queries)
    # Column c holds the (c - positive)-th follower in the ring; the 0th follower is the product itself.
    follower = (column[None, :] - positive[rows, None]) % num_queries
    products = ring[(place[rows, None] + follower) % total]
    return PromptDraw(products, modality[rows], positive[rows], own_image[rows], gaussian[rows])


def gaussian_prompts(num_queries: int, width: int, *, seed: int, step: int) -> Tensor:
    """(T, D) standard normal prompts of one step, the same for all rows and ranks, as they are at inference."""
    generator = _generator(seed, step, _GAUSSIAN)
    return torch.randn(num_queries, width, generator=generator)


def build_prompts(
    draw: PromptDraw, texts: Tensor, images: Tensor, noise: Tensor, own_texts: Tensor, own_images: Tensor
) -> Tensor:
    """Prompts (B, T, D) out of the global pools `texts`, `images` (G, D) and `noise` (T, D).

    The positive is the row's own title or image (B, D) and the only one with a gradient.
    """
    prompts = torch.where(draw.modality[..., None].bool(), images[draw.products], texts[draw.products])
    prompts = torch.where(draw.gaussian[:, None, None], noise, prompts)
    is_image = draw.modality.gather(1, draw.positive[:, None]).bool()
    own = torch.where(is_image, own_images, own_texts)
    index = draw.positive[:, None, None].expand(-1, 1, prompts.shape[-1])
    return prompts.scatter(1, index, own[:, None].to(prompts.dtype))


def draw_tokens(num_tokens: int, keep: float, *, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Sorted indices (K,) of the patch tokens that views a and b train on, K = ceil(keep N); the same on all ranks.

    Source: patch dropout (arXiv 2208.07220, 2212.00794), after the tower here.
    """
    generator = _generator(seed, step, _TOKENS)
    count = math.ceil(keep * num_tokens)
    first, second = (torch.randperm(num_tokens, generator=generator)[:count].sort().values for _ in range(2))
    return first, second


def take_query(slots: Tensor, index: Tensor) -> Tensor:
    """(B, T, D), (B,) -> (B, D): one query's output of every image."""
    return slots[torch.arange(len(slots), device=slots.device), index]


def full_precision(like: Tensor) -> torch.autocast:
    """No autocast inside: it would round the operands of products to bfloat16 again, whatever `.float()` made of them.

    Both losses' logits are divided by a temperature near 0.1: a cosine's rounding of 2^-9 is 0.02 of a logit there.
    """
    return torch.autocast(like.device.type, enabled=False)


def intra_product_loss(slots: Tensor, texts: Tensor, positive: Tensor, excluded: Tensor, temperature: float) -> Tensor:
    """Cross-entropy over the T outputs of each image: the positive one is what the title speaks of.

    slots (B, T, D), texts (B, D), positive (B,); excluded (B, T) bool: prompts of the same title or product.
    """
    with full_precision(slots):
        logits = torch.einsum("btd,bd->bt", F.normalize(slots.float(), dim=-1), F.normalize(texts.float(), dim=-1))
        logits = (logits / temperature).masked_fill(excluded, float("-inf"))
        return F.cross_entropy(logits, positive)


def matching_loss(
    model: ECLIP,
    instances: Tensor,
    texts: Tensor,
    pool: Tensor,
    draw: PromptDraw,
    excluded: Tensor,
    *,
    seed: int,
    step: int,
    rank: int = 0,
    world_size: int = 1,
) -> Tensor:
    """L_itm: instance (B, D) with its title (B, D), and with one of its T-1 negative titles, drawn in proportion to
    exp(scale * cosine): the more alike, the more often. A row with all negatives excluded counts its match alone."""
    total, num_queries = len(instances) * world_size, draw.products.shape[1]
    with full_precision(instances):
        unit, own, others = (F.normalize(x.float(), dim=-1) for x in (instances, texts, pool))
        candidates = others[draw.products]
        with torch.no_grad():
            similarity = model.scale().detach() * torch.einsum("bd,btd->bt", unit, candidates)
            similarity.scatter_(1, draw.positive[:, None], float("-inf")).masked_fill_(excluded, float("-inf"))
            generator = _generator(seed, step, _MATCHING)
            noise = torch.rand(total, num_queries, generator=generator).clamp_min_(1e-12)
            gumbel = -torch.log(-torch.log(noise[rank * len(unit) : (rank + 1) * len(unit)].to(unit.device)))
            chosen = (similarity + gumbel).argmax(dim=1)
            usable = similarity.isfinite().any(dim=1)
        # Unit vectors times sqrt(D): entries of the product are of order one, as a linear head wants them.
        width = unit.shape[-1]
        matched = model.match(unit * own * width)
        unmatched = model.match(unit * take_query(candidates, chosen) * width)
        target = torch.ones(len(unit), dtype=torch.long, device=unit.device)
        positive_loss = F.cross_entropy(matched, target)
        negative_loss = F.cross_entropy(unmatched, target - 1, reduction="none")
        return (positive_loss + (negative_loss * usable).mean()) / 2


def compute_losses(
    model: ECLIP,
    momentum: ECLIP | None,
    batch: Batch,
    config: ObjectiveConfig,
    *,
    features: CachedFeatures | None = None,
    step: int,
    seed: int,
    group: dist.ProcessGroup | None = None,
) -> dict[str, Tensor]:
    """All losses of one step: "loss" (the weighted sum) and each term by name, scalars, float32.

    momentum may be None when objective="clip". Sources: see the module's docstring.
    """
    cached = features or CachedFeatures(None, None)
    image_a = _encode_image(model, batch, cached, config, view=0, step=step, seed=seed)
    text_a = _encode_text(model, batch, cached, view=0)
    loss_function = _loss_function(model, len(batch.product_ids), group)
    losses = {"itc": _image_text_loss(loss_function, model, image_a.cls, text_a, batch, config)}
    if config.objective == "eclip":
        assert momentum is not None, "the ECLIP objective needs the momentum model"
        losses |= _instance_losses(
            loss_function, model, momentum, batch, config, cached, image_a, text_a, step=step, seed=seed, group=group
        )
    losses["loss"] = _weighted_sum(losses, config, step)
    return losses


def _encode_image(
    model: ECLIP, batch: Batch, cached: CachedFeatures, config: ObjectiveConfig, *, view: int, step: int, seed: int
) -> ImageFeatures:
    kept = draw_tokens(model.config.grid**2, config.token_keep, seed=seed, step=step)[view]
    if cached.images is not None:
        return model.project_image(_keep_tokens(cached.images[:, view], kept))
    assert batch.images is not None, "a batch without images needs cached features"
    return model.project_image(_keep_tokens(model.image_tower(batch.images[:, view]), kept))


def _keep_tokens(tower_output: Tensor, kept: Tensor) -> Tensor:
    """(B, 1+N, width) -> (B, 1+K, width): CLS and the patch tokens `kept` (K,)."""
    if len(kept) == tower_output.shape[1] - 1:
        return tower_output
    rows = torch.cat([torch.zeros(1, dtype=kept.dtype), kept + 1]).to(tower_output.device)
    return tower_output.index_select(1, rows)


def _encode_text(model: ECLIP, batch: Batch, cached: CachedFeatures, *, view: int) -> Tensor:
    if cached.texts is not None:
        return model.project_text(cached.texts[:, view])
    count = len(batch.product_ids)
    bounds = batch.cu_seqlens[view * count : (view + 1) * count + 1]
    return model.encode_text(batch.tokens[int(bounds[0]) : int(bounds[-1])], bounds - bounds[0])


def _loss_function(model: ECLIP, count: int, group: dist.ProcessGroup | None) -> Callable[..., Tensor]:
    """The contrastive loss of `count` rows of this rank."""
    if model.config.kernels != "reference":
        # The sampler gives every rank as many products, so counts need not be exchanged, nor the GPU be waited for.
        rows_per_rank = None if group is None else (count,) * dist.get_world_size(group)
        return partial(_contrast, partial(contrastive_loss, group=group, rows_per_rank=rows_per_rank))
    if group is not None and dist.get_world_size(group) > 1:
        raise ValueError("--kernels reference compares on one rank; start without torchrun, or use --kernels auto")
    return partial(_contrast, contrastive_loss_reference)


def _contrast(loss: Callable[..., Tensor], images: Tensor, texts: Tensor, scale: Tensor, **options: Any) -> Tensor:
    with full_precision(images):
        images, texts = (F.normalize(x.float(), dim=-1) for x in (images, texts))
    # The kernels take autocast's dtype for the operands of their products: fp32 ones have no tensor cores. What
    # matters, the sums and the pairs' own logits, is float32 inside.
    return loss(images, texts, scale, **options)


def _image_text_loss(
    loss_function: Callable[..., Tensor],
    model: ECLIP,
    images: Tensor,
    texts: Tensor,
    batch: Batch,
    config: ObjectiveConfig,
) -> Tensor:
    titles = batch.title_ids[:, 0].contiguous()
    ids = {"none": None, "title": titles, "catalog": batch.catalog_ids}[config.soft_labels]
    return loss_function(
        images,
        texts,
        model.scale(),
        image_ids=ids,
        text_ids=ids,
        positives="diagonal" if ids is None else "soft",
    )


def _instance_losses(
    loss_function: Callable[..., Tensor],
    model: ECLIP,
    momentum: ECLIP,
    batch: Batch,
    config: ObjectiveConfig,
    cached: CachedFeatures,
    image_a: ImageFeatures,
    text_a: Tensor,
    *,
    step: int,
    seed: int,
    group: dist.ProcessGroup | None,
) -> dict[str, Tensor]:
    rank, world_size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    count, device = len(batch.product_ids), text_a.device
    where = {"seed": seed, "step": step, "rank": rank, "world_size": world_size}
    draw = draw_prompts(count, model.config.num_queries, config, **where).to(device)
    noise = gaussian_prompts(model.config.num_queries, model.config.embed_dim, seed=seed, step=step).to(text_a)
    own = draw.own_image[:, None]
    with torch.no_grad():
        image_b = _encode_image(momentum, batch, cached, config, view=1, step=step, seed=seed)
        text_b = _encode_text(momentum, batch, cached, view=1)
        # One pass of each encoder a branch: the other branch's (detached) image feature is this branch's image prompt.
        image_prompts = torch.where(own, image_b.cls, image_a.cls.detach())
        pools = gather_rows(text_b, group), gather_rows(image_a.cls, group)
        key_prompts = build_prompts(draw, *pools, noise, text_b, image_prompts)
        keys = take_query(momentum.decode(image_b.tokens, key_prompts, draw.modality).slots, draw.positive)
    text_pool = gather_rows(text_a, group)
    image_prompts = torch.where(own, image_a.cls.detach(), image_b.cls)
    prompts = build_prompts(draw, text_pool, gather_rows(image_b.cls, group), noise, text_a, image_prompts)
    output = model.decode(image_a.tokens, prompts, draw.modality)
    instances = take_query(output.slots, draw.positive)
    excluded = _same_title_or_product(batch, draw, group)
    return {
        "inter": loss_function(
            instances,
            keys,
            torch.full((), 1 / config.inter_temperature, device=device),
            image_ids=batch.product_ids,
            text_ids=batch.product_ids,
            positives="mask",
            sides="rows",
        ),
        "itm": matching_loss(model, instances, text_a, text_pool, draw, excluded, **where),
        "intra": intra_product_loss(output.slots, text_a, draw.positive, excluded, config.intra_temperature),
        "entropy": output.entropy,
    }


def _same_title_or_product(batch: Batch, draw: PromptDraw, group: dist.ProcessGroup | None) -> Tensor:
    """(B, T) bool: negatives that carry the row's own title or product, which are no negatives at all."""
    products = gather_rows(batch.product_ids, group)[draw.products] == batch.product_ids[:, None]
    titles = gather_rows(batch.title_ids[:, 0], group)[draw.products] == batch.title_ids[:, :1]
    return (products | titles).scatter(1, draw.positive[:, None], False)


def _weighted_sum(losses: dict[str, Tensor], config: ObjectiveConfig, step: int) -> Tensor:
    ramp = min(1.0, (step + 1) / config.decoder_warmup_steps) if config.decoder_warmup_steps else 1.0
    total = config.itc_weight * losses["itc"]
    for name in ("inter", "itm", "intra", "entropy"):
        if name in losses:
            total = total + ramp * getattr(config, f"{name}_weight") * losses[name]
    return total
