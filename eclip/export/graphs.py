"""The model as three functions of tensors, which become ONNX graphs: plain operations, any batch size, padded text.

    image     images (n, 3, S, S) uint8 RGB                          -> embedding (n, D), tokens (n, N, D)
    text      input_ids (n, L) int64, attention_mask (n, L) int64    -> embedding (n, D)
    decoder   tokens (n, N, D), prompt (n, D), modality (n,) int64   -> instance (n, D), map (n, N)

Embeddings and instances have unit length. A prompt is an embedding of a text (modality 0) or an image (1). Pixels are
normalised inside. Texts are padded behind, mask 1 where a token is; towers that were trained on padding (SigLIP) take
max_tokens of them and attend to all.

Letters: n images or texts, L tokens of the longest text, N patch tokens, D embedding width, S side of the image.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eclip.model.eclip import ECLIP
from eclip.model.transformer import Attention, PreNormBlock


class ImageGraph(nn.Module):
    """Image tower and projection."""

    def __init__(self, model: ECLIP) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        found = self.model.encode_image(images)
        return F.normalize(found.cls, dim=-1), found.tokens


class TextGraph(nn.Module):
    """Text tower and projection, on padded texts: what `TextEncoder` computes of ragged ones."""

    def __init__(self, model: ECLIP) -> None:
        super().__init__()
        self.model, self.architecture = model, model.config.text_architecture

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        encoder = self.model.text_encoder
        length = input_ids.shape[1]
        x = encoder.word_embedding(input_ids) + encoder.position_embedding.weight[:length]
        x = x if encoder.norm is None else encoder.norm(x)
        allowed = self.allowed(attention_mask)
        for block in encoder.blocks:
            x = _block(block, x, allowed)
        x = self.pool(x, attention_mask)
        x = x if encoder.final_norm is None else encoder.final_norm(x)
        x = x if encoder.head is None else encoder.head(x)
        return F.normalize(self.model.project_text(x), dim=-1)

    def allowed(self, attention_mask: Tensor) -> Tensor:
        """(n or 1, 1, 1 or L, L) bool: what each token may attend to."""
        if self.architecture == "clip":  # padding comes last, and no token sees what follows it
            places = torch.arange(attention_mask.shape[1], device=attention_mask.device)
            return (places[None, :] <= places[:, None])[None, None]
        present = attention_mask.bool()[:, None, None, :]
        return torch.ones_like(present) if self.architecture == "siglip" else present

    def pool(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        """(n, L, D) to (n, D)."""
        pooling = self.model.config.text_pooling
        if pooling == "cls":
            return x[:, 0]
        if pooling == "mean":
            mask = attention_mask[..., None].to(x.dtype)
            return (x * mask).sum(1) / mask.sum(1)
        if self.architecture == "siglip":
            return x[:, -1]
        last = (attention_mask.sum(1) - 1)[:, None, None].expand(-1, 1, x.shape[-1])
        return x.gather(1, last)[:, 0]


class DecoderGraph(nn.Module):
    """Instance queries and decoder: one prompt an image."""

    negatives: Tensor

    def __init__(self, model: ECLIP) -> None:
        super().__init__()
        self.model = model
        # The prompts that `instance_queries` draws at every call: constants of the graph.
        width, count = model.config.embed_dim, model.config.num_queries - 1
        self.register_buffer("negatives", torch.randn(count, width, generator=torch.Generator().manual_seed(0)))

    def forward(self, tokens: Tensor, prompt: Tensor, modality: Tensor) -> tuple[Tensor, Tensor]:
        prompts = torch.cat([prompt[:, None], self.negatives.expand(prompt.shape[0], -1, -1)], dim=1)
        found = self.model.decode(tokens, prompts, modality[:, None].expand(-1, prompts.shape[1]), return_map=True)
        assert found.assignment is not None
        return F.normalize(found.slots[:, 0], dim=-1), found.assignment[:, 0]


def _block(block: nn.Module, x: Tensor, allowed: Tensor) -> Tensor:
    """A block of the text tower on (n, L, D)."""
    attend: Attention = block.attn  # type: ignore[assignment]
    norm1, norm2, mlp = block.norm1, block.norm2, block.mlp
    if isinstance(block, PreNormBlock):
        x = x + block.ls1(_attention(attend, block.norm1(x), allowed))
        return x + block.ls2(block.mlp(block.norm2(x)))
    x = norm1(x + _attention(attend, x, allowed))  # type: ignore[operator]
    return norm2(x + mlp(x))  # type: ignore[operator]


def _attention(attention: Attention, x: Tensor, allowed: Tensor) -> Tensor:
    q, k, v = attention.qkv(x).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return attention.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=allowed).transpose(1, 2).flatten(-2))
