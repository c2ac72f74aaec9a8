"""Vision transformer (Dosovitskiy et al. 2021, arXiv 2010.11929): patches and a CLS token through pre-norm blocks.

CLIP's (arXiv 2103.00020) has one more norm before the blocks and no bias on the patches. SigLIP's (arXiv 2303.15343)
has no CLS token: a learnt query attends to the finished tokens, and what it finds stands in CLS's place, so that what
follows sees no difference.

Parameter names are timm's (patch_embed.proj, blocks.0.attn.qkv, norm_pre, attn_pool.latent, ...); weights/names.py has
those of others.
Letters: B images, N = grid * grid patches (K of them kept), S side in pixels, D width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eclip.model.residual import on_stream
from eclip.model.settings import ModelConfig
from eclip.model.transformer import MLP, PreNormBlock, init_transformer

PIXEL_STATISTICS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}
"""Mean and standard deviation of red, green, blue in [0, 1] that a tower's pixels are normalised with."""


class PatchEmbedding(nn.Module):
    """(B, 3, S, S) -> (B, N, D), patches row by row from the top left."""

    def __init__(self, width: int, patch_size: int, *, bias: bool = True) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch_size, stride=patch_size, bias=bias)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class AttentionPool(nn.Module):
    """One learnt query attends to all tokens, then a residual MLP: (B, N, D) -> (B, D). SigLIP's pooling."""

    def __init__(self, width: int, num_heads: int, *, eps: float, activation: str) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.latent = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, width), std=0.02))
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=eps)
        self.mlp = MLP(width, activation)

    def forward(self, tokens: Tensor) -> Tensor:
        q = self.q(self.latent).expand(tokens.shape[0], -1, -1).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k, v = self.kv(tokens).unflatten(-1, (2, self.num_heads, -1)).transpose(1, 3).unbind(2)
        x = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))
        return (x + self.mlp(self.norm(x)))[:, 0]


class ImageEncoder(nn.Module):
    """Images to final-normed tokens, the CLS token (or what stands for it) first."""

    pixel_mean: Tensor
    pixel_std: Tensor
    residual_dtype: torch.dtype | None = None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, heads, eps = config.vision_width, config.vision_heads, config.vision_eps
        activation, clip = config.vision_activation, config.vision_architecture == "clip"
        pooled = config.vision_architecture == "siglip"
        self.config = config
        self.patch_embed = PatchEmbedding(width, config.patch_size, bias=not clip)
        self.cls_token = None if pooled else nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, (not pooled) + config.grid**2, width))
        self.norm_pre = nn.LayerNorm(width, eps=eps) if clip else None
        self.blocks = nn.ModuleList(
            PreNormBlock(width, heads, eps=eps, layer_scale=config.layer_scale, activation=activation)
            for _ in range(config.vision_depth)
        )
        self.norm = nn.LayerNorm(width, eps=eps)
        self.attn_pool = AttentionPool(width, heads, eps=eps, activation=activation) if pooled else None
        self.apply(init_transformer)
        for token in (self.cls_token, self.pos_embed):
            if token is not None:
                nn.init.trunc_normal_(token, std=0.02)
        mean, std = PIXEL_STATISTICS[config.pixel_statistics]
        self.register_buffer("pixel_mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 RGB (B, 3, S, S) to the mean and deviation that the tower expects; floats are taken as normalised."""
        if images.is_floating_point():
            return images
        return (images.to(self.pixel_mean.dtype) / 255 - self.pixel_mean) / self.pixel_std

    def forward(self, images: Tensor, kept: Tensor | None = None) -> Tensor:
        """images: (B, 3, S, S) uint8, or float already normalised. Returns (B, 1+N, D), with `kept` (B, 1+K, D).

        kept: (K,) int64 indices of the patches that go through the blocks, beside CLS; they keep their positions, and
        attention pooling sees no others.
        Source: patch dropout (arXiv 2208.07220, 2212.00794). Raises ValueError for another S.
        """
        size = self.config.image_size
        if images.shape[1:] != (3, size, size):
            raise ValueError(
                f"images of shape {tuple(images.shape)}: this model reads (B, 3, {size}, {size}); "
                f"resize them or set --model.image-size"
            )
        x = self.embed(self.patch_embed(self.normalise(images)), kept)
        if self.norm_pre is not None:
            x = self.norm_pre(x)
        dtype, x = x.dtype, on_stream(x, self.residual_dtype)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x.to(dtype))
        return x if self.attn_pool is None else torch.cat([self.attn_pool(x)[:, None], x], dim=1)

    def embed(self, patches: Tensor, kept: Tensor | None) -> Tensor:
        """(B, N, D) to what enters the blocks: CLS before them where there is one, positions added, the kept ones."""
        if self.cls_token is None:
            x = patches + self.pos_embed
            return x if kept is None else x.index_select(1, kept)
        x = torch.cat([self.cls_token.expand(patches.shape[0], -1, -1), patches], dim=1) + self.pos_embed
        return x if kept is None else x.index_select(1, torch.cat([kept.new_zeros(1), kept + 1]))
