"""Vision transformer (Dosovitskiy et al. 2021, arXiv 2010.11929): patches and a CLS token through pre-norm blocks.

Parameter names are timm's (patch_embed.proj, blocks.0.attn.qkv, ...); weights/pretrained.py knows Hugging Face's too.
Letters: B images, N = grid * grid patches (K of them kept), S side in pixels, D width.
"""

import torch
from torch import Tensor, nn

from eclip.model.residual import on_stream
from eclip.model.settings import ModelConfig
from eclip.model.transformer import PreNormBlock, init_transformer

PIXEL_STATISTICS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
"""Mean and standard deviation of red, green, blue in [0, 1] that a tower's pixels are normalised with."""


class PatchEmbedding(nn.Module):
    """(B, 3, S, S) -> (B, N, D), patches row by row from the top left."""

    def __init__(self, width: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class ImageEncoder(nn.Module):
    """Images to final-normed tokens, the CLS token first."""

    pixel_mean: Tensor
    pixel_std: Tensor
    residual_dtype: torch.dtype | None = None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.vision_width
        self.config = config
        self.patch_embed = PatchEmbedding(width, config.patch_size)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + config.grid**2, width))
        self.blocks = nn.ModuleList(
            PreNormBlock(width, config.vision_heads, eps=config.vision_eps, layer_scale=config.layer_scale)
            for _ in range(config.vision_depth)
        )
        self.norm = nn.LayerNorm(width, eps=config.vision_eps)
        self.apply(init_transformer)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
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

        kept: (K,) int64 indices of the patches that go through the blocks, beside CLS; they keep their positions.
        Source: patch dropout (arXiv 2208.07220, 2212.00794). Raises ValueError for another S.
        """
        size = self.config.image_size
        if images.shape[1:] != (3, size, size):
            raise ValueError(
                f"images of shape {tuple(images.shape)}: this model reads (B, 3, {size}, {size}); "
                f"resize them or set --model.image-size"
            )
        patches = self.patch_embed(self.normalise(images))
        x = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1) + self.pos_embed
        if kept is not None:
            x = x.index_select(1, torch.cat([kept.new_zeros(1), kept + 1]))
        dtype, x = x.dtype, on_stream(x, self.residual_dtype)
        for block in self.blocks:
            x = block(x)
        return self.norm(x.to(dtype))
