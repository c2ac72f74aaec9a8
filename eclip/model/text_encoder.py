"""BERT's encoder (Devlin et al. 2019, arXiv 1810.04805) on packed ragged text, pooled to one vector a text.

BERT's token-type embedding is the same row for every token of a single text, so it has no parameter here:
weights/pretrained.py adds that row to the position embedding. BERT's pooler (a head of its pretraining) is left out.
Letters: n texts, total tokens of all of them, D width.
"""

import torch
from torch import Tensor, nn

from eclip.model.ragged import Kernel, Ragged, choose_kernel
from eclip.model.residual import LayerNorm
from eclip.model.settings import ModelConfig
from eclip.model.transformer import PostNormBlock, init_transformer

BERT_EPS = 1e-12


class TextEncoder(nn.Module):
    """Token ids to one vector a text: the first token's (`cls`) or the mean over all its tokens (`mean`)."""

    kernel: Kernel | None = None
    """Of attention, see `set_text_attention`; None: padded."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.text_width
        self.config = config
        self.word_embedding = nn.Embedding(config.vocab_size, width)
        self.position_embedding = nn.Embedding(config.max_positions, width)
        self.norm = LayerNorm(width, eps=BERT_EPS)
        self.blocks = nn.ModuleList(
            PostNormBlock(width, config.text_heads, eps=BERT_EPS) for _ in range(config.text_depth)
        )
        self.apply(init_transformer)

    def hidden(self, tokens: Tensor, ragged: Ragged) -> Tensor:
        """tokens: (total,) int64. Returns the last block's packed output (total, D).

        Raises ValueError for a text longer than the position embedding.
        """
        if ragged.longest > self.config.max_positions:
            raise ValueError(
                f"a text of {ragged.longest} tokens is longer than max_positions={self.config.max_positions}; "
                f"lower --data.max-tokens or raise --model.max-positions"
            )
        embedded = self.word_embedding(tokens) + self.position_embedding(ragged.positions)
        x = self.norm(embedded)
        for block in self.blocks:
            x = block(x, ragged)
        return x if self.norm.residual_dtype is None else x.to(embedded.dtype)

    def forward(self, tokens: Tensor, cu_seqlens: Tensor, *, longest: int | None = None) -> Tensor:
        """tokens: (total,) int64; cu_seqlens: (n+1,) int32, text s being tokens[cu_seqlens[s]:cu_seqlens[s+1]].

        longest: tokens of the longest text, or more; given, nothing is read from the device. Returns (n, D). Raises
        ValueError for one longer than max_positions, and, where longest is not given, for an empty text.
        """
        ragged = Ragged.from_cu_seqlens(cu_seqlens, total=len(tokens), longest=longest, kernel=self.kernel)
        x = self.hidden(tokens, ragged)
        if self.config.text_pooling == "cls":
            return x.index_select(0, ragged.starts)
        total = x.new_zeros(len(ragged.lengths), x.shape[1]).index_add(0, ragged.sequence, x)
        return total / ragged.lengths[:, None]


def set_text_attention(model: nn.Module, choice: str, device: torch.device, dtype: torch.dtype) -> str:
    """Let the text towers in `model` compute attention by `choice`, for inputs on `device` in `dtype`: a name of
    ragged.KERNELS, or "auto" for the first that works there. Other inputs are padded.

    dtype: of queries and keys, which is autocast's where it is on. Returns the name. Raises ValueError where the kernel
    that is asked for is not installed or does not work.
    """
    name = "padded"
    for tower in model.modules():
        if isinstance(tower, TextEncoder):
            heads = tower.config.text_heads
            head_dim = tower.config.text_width // heads
            tower.kernel = choose_kernel(choice, device, dtype, num_heads=heads, head_dim=head_dim)
            name = tower.kernel.name
    return name
