"""The random draws of a step: which product prompts which query, of which kind, and which patch tokens are kept.

Every draw is a function of (seed, step) over the GLOBAL batch, on the CPU: every rank draws the same table and takes
its rows, and every micro-batch some of those, so that losses depend neither on the number of ranks nor on that of
micro-batches. They are drawn ahead and travel to the device with the batch: a step itself waits for none of them.

Letters: B products of this rank or micro-batch, G of the global batch, T queries, N patch tokens (K of them kept),
D embedding width.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from eclip.objectives.settings import ObjectiveConfig


class Stream(IntEnum):
    """Purposes of random numbers; each has a stream of its own, so that one more draw moves none of the others."""

    PROMPTS = 0
    GAUSSIAN = 1
    MATCHING = 2
    TOKENS = 3


def generator(seed: int, step: int, stream: Stream) -> torch.Generator:
    """The random numbers of one purpose at one step, on every rank the same."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step + stream * 250_000_000) & 0x7FFF_FFFF_FFFF_FFFF)


@dataclass(frozen=True)
class PromptDraw:
    """Which product prompts which query, for some rows."""

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
    gumbel: Tensor
    """(B, T) float32, Gumbel noise: the argmax of logits plus it is a draw from their softmax."""

    def map(self, change: Callable[[Tensor], Tensor]) -> "PromptDraw":
        """Every tensor changed."""
        return PromptDraw(*(change(getattr(self, f.name)) for f in dataclasses.fields(self)))


@dataclass(frozen=True)
class Draws:
    """All random numbers that an objective wants for rows [first, first + B) of a step's global batch."""

    first: int
    kept: Tensor | None = None
    """(2, K) int64, sorted: the patch tokens that views a and b train on, the same for all rows; None for all."""
    prompts: PromptDraw | None = None
    noise: Tensor | None = None
    """(T, D) float32, the N(0, I) prompts, the same for all rows."""

    def map(self, change: Callable[[Tensor], Tensor]) -> "Draws":
        """Every tensor changed: moved to a device, pinned."""
        return Draws(
            first=self.first,
            kept=None if self.kept is None else change(self.kept),
            prompts=None if self.prompts is None else self.prompts.map(change),
            noise=None if self.noise is None else change(self.noise),
        )

    def rows(self, start: int, stop: int) -> "Draws":
        """Those of rows start to stop of these."""
        prompts = None if self.prompts is None else self.prompts.map(lambda rows: rows[start:stop])
        return dataclasses.replace(self, first=self.first + start, prompts=prompts)


def draw_prompts(
    total: int, rows: range, num_queries: int, config: ObjectiveConfig, *, seed: int, step: int
) -> PromptDraw:
    """Draw the prompts of `rows` of a global batch of `total`; every rank draws the same global table.

    The positive's index is random: at a fixed one its position embedding gives L_intra's answer away. The T-1 negatives
    follow the product in a random ring of the batch: distinct, never the product itself, O(G T) to draw.
    """
    if total < num_queries:
        raise ValueError(
            f"a global batch of {total} products cannot prompt {num_queries} queries with distinct products; "
            f"raise --global-batch-size to at least {num_queries} or lower --num-queries"
        )
    numbers = generator(seed, step, Stream.PROMPTS)
    ring = torch.randperm(total, generator=numbers)
    place = torch.empty_like(ring).scatter_(0, ring, torch.arange(total))
    modality = (torch.rand(total, num_queries, generator=numbers) < config.image_prompt_share).long()
    positive = torch.randint(num_queries, (total,), generator=numbers)
    own_image = torch.rand(total, generator=numbers) < config.own_image_share
    gaussian = torch.rand(total, generator=numbers) < config.gaussian_share
    own = slice(rows.start, rows.stop)
    column = torch.arange(num_queries)
    # Column c holds the (c - positive)-th follower in the ring; the 0th follower is the product itself.
    follower = (column[None, :] - positive[own, None]) % num_queries
    products = ring[(place[own, None] + follower) % total]
    noise = torch.rand(total, num_queries, generator=generator(seed, step, Stream.MATCHING))[own].clamp_min_(1e-12)
    gumbel = -torch.log(-torch.log(noise))
    return PromptDraw(products, modality[own], positive[own], own_image[own], gaussian[own], gumbel)


def gaussian_prompts(num_queries: int, width: int, *, seed: int, step: int) -> Tensor:
    """(T, D) standard normal prompts of one step, the same for all rows and ranks, as they are at inference."""
    return torch.randn(num_queries, width, generator=generator(seed, step, Stream.GAUSSIAN))


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


def draw_tokens(num_tokens: int, keep: float, *, seed: int, step: int) -> Tensor | None:
    """(2, K) sorted indices of the patch tokens that views a and b train on, K = ceil(keep N); None when all stay.

    The same for all rows of the global batch. Source: patch dropout (arXiv 2208.07220, 2212.00794).
    """
    count = math.ceil(keep * num_tokens)
    if count == num_tokens:
        return None
    numbers = generator(seed, step, Stream.TOKENS)
    return torch.stack([torch.randperm(num_tokens, generator=numbers)[:count].sort().values for _ in range(2)])


def take_query(slots: Tensor, index: Tensor) -> Tensor:
    """(B, T, D), (B,) -> (B, D): one query's output of every image."""
    return slots[torch.arange(len(slots), device=slots.device), index]
