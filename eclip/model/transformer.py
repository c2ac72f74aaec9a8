"""Transformer blocks shared by the two encoders and the instance decoder, on PyTorch's scaled dot product attention.

Vision transformers and the text towers of CLIP and SigLIP normalise before each sub-layer, BERT and the instance
decoder after the residual sum; both use the same attention and the same two-layer perceptron.

Text is ragged: everything that acts on single tokens runs on the packed (total, D) rows, so that padding costs nothing
there; only attention needs to know the sequences, see ragged.py.

Letters: B images or sequences, N tokens, D width, total = rows of a packed ragged batch.
"""

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from eclip.model.ragged import Ragged, attend_ragged
from eclip.model.residual import LayerNorm, LayerScale


def quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x), OpenAI CLIP's activation; written with silu, which keeps one tensor for the backward pass."""
    return F.silu(1.702 * x) / 1.702


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by its tanh formula, SigLIP's activation."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "quick_gelu": quick_gelu, "gelu_tanh": gelu_tanh}
"""`gelu` is the exact one, by erf."""


class Attention(nn.Module):
    """Multi-head self-attention with one matrix for queries, keys and values."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, ragged: Ragged | None = None) -> Tensor:
        """x: (B, N, D), or with `ragged` packed (total, D). Returns x's shape."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        if ragged is None:
            q, k, v = (part.transpose(1, 2) for part in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        else:
            out = attend_ragged(q, k, v, ragged)
        return self.proj(out.flatten(-2))


class MLP(nn.Module):
    """Two linear layers, 4D wide between them, and one of `ACTIVATIONS`."""

    def __init__(self, width: int, activation: str = "gelu") -> None:
        super().__init__()
        self.activate = ACTIVATIONS[activation]
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activate(self.fc1(x)))


class PreNormBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): the vision transformer's block, and CLIP's of texts."""

    def __init__(
        self, width: int, num_heads: int, *, eps: float, layer_scale: bool = False, activation: str = "gelu"
    ) -> None:
        super().__init__()
        self.norm1 = LayerNorm(width, eps=eps)
        self.attn = Attention(width, num_heads)
        self.ls1 = LayerScale(width) if layer_scale else nn.Identity()
        self.norm2 = LayerNorm(width, eps=eps)
        self.mlp = MLP(width, activation)
        self.ls2 = LayerScale(width) if layer_scale else nn.Identity()

    def forward(self, x: Tensor, ragged: Ragged | None = None) -> Tensor:
        """x: (B, N, D), or with `ragged` packed (total, D). Returns x's shape."""
        x = x + self.ls1(self.attn(self.norm1(x), ragged))
        return x + self.ls2(self.mlp(self.norm2(x)))


class PostNormBlock(nn.Module):
    """norm(x + attention(x)), then norm(x + mlp(x)): the block of BERT and, after slot attention, of the decoder."""

    def __init__(self, width: int, num_heads: int, *, eps: float, activation: str = "gelu") -> None:
        super().__init__()
        self.attn = Attention(width, num_heads)
        self.norm1 = LayerNorm(width, eps=eps)
        self.mlp = MLP(width, activation)
        self.norm2 = LayerNorm(width, eps=eps)

    def forward(self, x: Tensor, ragged: Ragged | None = None) -> Tensor:
        """x: (B, N, D), or with `ragged` packed (total, D). Returns x's shape."""
        x = self.norm1(x + self.attn(x, ragged))
        return self.norm2(x + self.mlp(x))


def init_transformer(module: nn.Module) -> None:
    """For `module.apply`: truncated normal 0.02 for matrices and embeddings, zeros for biases (BERT, ViT)."""
    if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding):
        nn.init.trunc_normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
        nn.init.zeros_(module.bias)
