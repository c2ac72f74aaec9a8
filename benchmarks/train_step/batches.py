"""Random batches in the shapes of a run: what a step is given, for ours and for its peers.

Times do not depend on pixels. They do on lengths of titles, which are those of a catalogue here: 20 tokens in the mean,
between 6 and the most allowed, so that padding costs what it does in a run.

Letters: B products, L tokens of the longest title of a batch, T queries, N patch tokens, S side in pixels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from eclip.config import RunConfig
from eclip.dataloading.schema import Batch
from eclip.objectives.draws import PromptDraw
from eclip.objectives.objective import make_objective
from eclip.objectives.views import CachedFeatures
from eclip.training.step import Part

MEAN_TOKENS, FEWEST_TOKENS = 20, 6


def make_parts(config: RunConfig, device: torch.device, *, step: int = 0) -> list[Part]:
    """One step of `config` on `device`: a part, or with micro_batch several; another step is other data."""
    total = config.global_batch_size
    size = config.micro_batch or total
    if total % size:
        raise ValueError(f"micro_batch={size} does not divide global_batch_size={total}; choose a divisor")
    objective = make_objective(config.objective)
    draws = objective.draw(total, range(total), config.model, step=step, seed=config.seed)
    parts = []
    for k in range(total // size):
        numbers = torch.Generator().manual_seed(step * 10_007 + k)
        batch = _batch(config, size, k * size, numbers, device, step=step, part=k, parts=total // size)
        part = Part(batch, _features(config, size, numbers), draws.rows(k * size, (k + 1) * size))
        parts.append(_on(part, device))
    return parts


def _batch(
    config: RunConfig,
    count: int,
    first: int,
    numbers: torch.Generator,
    device: torch.device,
    *,
    step: int,
    part: int,
    parts: int,
) -> Batch:
    images, side = None, config.model.image_size
    if not config.cache_features:
        # On the device: a batch of 16k has 5 GB of pixels.
        pixels = torch.Generator(device).manual_seed(step * 10_007 + part)
        shape = (count, 2, 3, side, side)
        images = torch.randint(0, 256, shape, generator=pixels, dtype=torch.uint8, device=device)
    spread = torch.empty(2 * count).exponential_(1 / (MEAN_TOKENS - FEWEST_TOKENS), generator=numbers)
    lengths = (FEWEST_TOKENS + spread).long().clamp_(max=config.data.max_tokens)
    products = torch.arange(first, first + count)
    by_view = lengths.view(2, count)
    return Batch(
        images=images,
        image_rows=torch.stack([2 * products, 2 * products + 1], dim=1),
        tokens=torch.randint(5, config.model.vocab_size, (int(lengths.sum()),), generator=numbers),
        cu_seqlens=torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int(),
        # Two products in three share their title with another, as two colours of one chair do: soft labels have work.
        product_ids=products,
        catalog_ids=products // 3,
        category_ids=torch.zeros_like(products),
        title_ids=torch.stack([products - products % 3 // 2, products], dim=1),
        keys=[],
        step=step,
        epoch=0,
        part=part,
        parts=parts,
        token_counts=(int(by_view[0].sum()), int(by_view[1].sum())),
        longest=(int(by_view[0].max()), int(by_view[1].max())),
    )


def _features(config: RunConfig, count: int, numbers: torch.Generator) -> CachedFeatures | None:
    """Of locked towers, in the scale of what a final norm gives."""
    if not config.cache_features:
        return None
    model = config.model
    images = torch.randn(count, 2, 1 + model.grid**2, model.vision_width, generator=numbers)
    texts = torch.randn(count, 2, model.text_width, generator=numbers) if config.lock_text else None
    return CachedFeatures(images, texts)


def _on(part: Part, device: torch.device) -> Part:
    cached = None if part.cached is None else part.cached.map(lambda x: x.to(device))
    return Part(part.batch.map(lambda x: x.to(device)), cached, part.draws.map(lambda x: x.to(device)))


@dataclass(frozen=True)
class PaddedBatch:
    """The same data as a library for padded text wants it."""

    images: Tensor | None
    """(B, 2, 3, S, S) uint8."""
    input_ids: Tensor
    """(2, B, L) int64, views a and b."""
    attention_mask: Tensor
    """(2, B, L) int64."""
    features: CachedFeatures | None
    products: Tensor
    """(B,) int64."""
    titles: Tensor
    """(B,) int64, of views a."""
    prompts: PromptDraw
    noise: Tensor
    """(T, D)."""


def pad(part: Part) -> PaddedBatch:
    """A whole batch, both views to one length, on its device."""
    batch, draws = part.batch, part.draws
    assert draws.prompts is not None and draws.noise is not None and draws.kept is None
    lengths = batch.cu_seqlens.diff().long()
    present = torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]
    ids = torch.zeros(present.shape, dtype=torch.int64, device=lengths.device)
    ids[present] = batch.tokens
    return PaddedBatch(
        images=batch.images,
        input_ids=ids.unflatten(0, (2, -1)),
        attention_mask=present.long().unflatten(0, (2, -1)),
        features=part.cached,
        products=batch.product_ids,
        titles=batch.title_ids[:, 0],
        prompts=draws.prompts,
        noise=draws.noise,
    )
