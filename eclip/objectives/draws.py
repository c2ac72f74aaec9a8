"""The random draws of a step: which product prompts which query, of which kind, and which patch tokens are kept.

Every draw is a function of (seed, step) over the GLOBAL batch, on the CPU: every rank draws the same table and takes
its rows, so that losses do not depend on the number of ranks.

Letters: B products of this rank, G of the global batch, T queries, N patch tokens, D embedding width.
"""

import dataclasses
import math
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
    numbers = generator(seed, step, Stream.PROMPTS)
    ring = torch.randperm(total, generator=numbers)
    place = torch.empty_like(ring).scatter_(0, ring, torch.arange(total))
    modality = (torch.rand(total, num_queries, generator=numbers) < config.image_prompt_share).long()
    positive = torch.randint(num_queries, (total,), generator=numbers)
    own_image = torch.rand(total, generator=numbers) < config.own_image_share
    gaussian = torch.rand(total, generator=numbers) < config.gaussian_share
    rows = torch.arange(rank * local, (rank + 1) * local)
    column = torch.arange(num_queries)
    # Column c holds the (c - positive)-th follower in the ring; the 0th follower is the product itself.
    follower = (column[None, :] - positive[rows, None]) % num_queries
    products = ring[(place[rows, None] + follower) % total]
    return PromptDraw(products, modality[rows], positive[rows], own_image[rows], gaussian[rows])


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


def draw_tokens(num_tokens: int, keep: float, *, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Sorted indices (K,) of the patch tokens that views a and b train on, K = ceil(keep N); the same on all ranks.

    Source: patch dropout (arXiv 2208.07220, 2212.00794), after the tower here.
    """
    numbers = generator(seed, step, Stream.TOKENS)
    count = math.ceil(keep * num_tokens)
    first, second = (torch.randperm(num_tokens, generator=numbers)[:count].sort().values for _ in range(2))
    return first, second


def take_query(slots: Tensor, index: Tensor) -> Tensor:
    """(B, T, D), (B,) -> (B, D): one query's output of every image."""
    return slots[torch.arange(len(slots), device=slots.device), index]
