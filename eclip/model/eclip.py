"""ECLIP: two encoders, two projections, instance queries and the instance decoder (arXiv 2304.02853, section 3).

Each encoder is split in two, tower and projection, because a locked tower's output can be computed once and cached:
encode_image = project_image(image_tower(...)), encode_text = project_text(text_tower(...)).

Letters: B images, N patch tokens (K of them kept), T queries, D = embed_dim, n texts.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from eclip.model.image_encoder import ImageEncoder
from eclip.model.instance_decoder import DecoderOutput, InstanceDecoder, InstanceQueries
from eclip.model.settings import ModelConfig
from eclip.model.text_encoder import TextEncoder

INITIAL_TEMPERATURE = 0.07
MAX_LOGIT_SCALE = 100.0


@dataclass(frozen=True)
class ImageFeatures:
    """Projected by g_I, not normalised."""

    cls: Tensor
    """(B, D) global feature."""
    tokens: Tensor
    """(B, N, D) patch tokens, row by row from the top left, or the K kept ones."""


class ECLIP(nn.Module):
    """The whole model. Training and evaluation call its parts; there is no single forward."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.image_encoder = ImageEncoder(config)
        self.text_encoder = TextEncoder(config)
        self.image_projection = nn.Linear(config.vision_width, config.embed_dim)
        self.text_projection = nn.Linear(config.text_width, config.embed_dim)
        for projection in (self.image_projection, self.text_projection):
            # Orthogonal: a pretrained tower's similarities survive the first step.
            nn.init.orthogonal_(projection.weight)
            nn.init.zeros_(projection.bias)
        self.queries = InstanceQueries(config)
        self.instance_decoder = InstanceDecoder(config)
        self.matching_head = nn.Linear(config.embed_dim, 2)
        nn.init.trunc_normal_(self.matching_head.weight, std=0.02)
        nn.init.zeros_(self.matching_head.bias)
        # One element, not a scalar: FSDP2 shards dimension 0.
        self.logit_scale = nn.Parameter(torch.full((1,), -math.log(INITIAL_TEMPERATURE)))

    def image_tower(self, images: Tensor, kept: Tensor | None = None) -> Tensor:
        """images: (B, 3, S, S) uint8 RGB, or float already normalised. Returns (B, 1+N, vision_width), CLS first.

        kept: (K,) sorted int64, the patch tokens that the tower computes, for (B, 1+K, vision_width); None for all.
        """
        return self.image_encoder(images, kept)

    def project_image(self, tower_output: Tensor) -> ImageFeatures:
        """g_I of every token of `image_tower`'s output."""
        projected = self.image_projection(tower_output)
        return ImageFeatures(projected[:, 0], projected[:, 1:])

    def encode_image(self, images: Tensor, kept: Tensor | None = None) -> ImageFeatures:
        """images: (B, 3, S, S) uint8 RGB, or float already normalised; kept: as in `image_tower`."""
        return self.project_image(self.image_tower(images, kept))

    def text_tower(self, tokens: Tensor, cu_seqlens: Tensor, *, longest: int | None = None) -> Tensor:
        """Ragged texts, tokens (total,) int64 and cu_seqlens (n+1,) int32, to pooled (n, text_width).

        longest: tokens of the longest text, or more, for who knows it: else the device is waited for to read it.
        """
        return self.text_encoder(tokens, cu_seqlens, longest=longest)

    def project_text(self, tower_output: Tensor) -> Tensor:
        """g_T: (n, text_width) -> (n, D), not normalised."""
        return self.text_projection(tower_output)

    def encode_text(self, tokens: Tensor, cu_seqlens: Tensor, *, longest: int | None = None) -> Tensor:
        """Ragged texts to (n, D), not normalised; longest: as in `text_tower`."""
        return self.project_text(self.text_tower(tokens, cu_seqlens, longest=longest))

    def decode(self, tokens: Tensor, prompts: Tensor, modality: Tensor, *, return_map: bool = False) -> DecoderOutput:
        """tokens: (B, N, D); prompts: (B, T, D), any length; modality: (B, T) int64, 0 text, 1 image.

        return_map: also export the assignment of tokens to queries.
        """
        return self.decode_queries(tokens, self.queries(prompts, modality), return_map=return_map)

    def decode_queries(self, tokens: Tensor, queries: Tensor, *, return_map: bool = False) -> DecoderOutput:
        """`decode` with finished queries (B, T, D), e.g. from `instance_queries`."""
        return self.instance_decoder(tokens, queries, return_map=return_map)

    def instance_queries(self, prompt: Tensor, modality: int, *, seed: int = 0) -> Tensor:
        """Queries for inference, (B, T, D): `prompt` (B, D), of one modality (0 text, 1 image), at index 0.

        The other T-1 prompts are drawn from N(0, I), the same ones for every image and every call with this seed. They
        get position and type embeddings like the positive (a choice; the paper does not say): what all queries have in
        common drops out of the softmax over queries, and must do so here as it did in training. Training draws the
        positive's index at random, so index 0 is as good as any.
        """
        count, width = self.config.num_queries - 1, self.config.embed_dim
        generator = torch.Generator().manual_seed(seed)
        negatives = torch.randn(count, width, generator=generator).to(prompt)
        prompts = torch.cat([prompt[:, None], negatives.expand(len(prompt), -1, -1)], dim=1)
        return self.queries(prompts, torch.full(prompts.shape[:2], modality, device=prompt.device))

    def match(self, features: Tensor) -> Tensor:
        """The matching head f of L_itm: (B, D) -> (B, 2) logits, class 1 = matched."""
        return self.matching_head(features)

    def scale(self) -> Tensor:
        """exp(logit_scale), a scalar; `clamp_logit_scale` keeps it between 1 and 100."""
        return self.logit_scale[0].exp()

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Bring the scale back between 1 and 100: after each optimizer step, and after loading.

        The parameter and not the scale: past a clamp in the forward pass its gradient is 0, and it never comes back.
        Each rank of FSDP2 clamps its own shard.
        """
        scale: Tensor = self.logit_scale
        local = scale.to_local() if isinstance(scale, DTensor) else scale
        local.clamp_(0, math.log(MAX_LOGIT_SCALE))
