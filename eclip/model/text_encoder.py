"""Packed ragged text to one vector a text: BERT's encoder (Devlin et al. 2019, arXiv 1810.04805), CLIP's or SigLIP's.

                before the blocks   blocks      attention          pooled                     then
    bert        norm                post-norm   whole text         first token, or mean       -
    clip        -                   pre-norm    earlier tokens     last token: end of text    final_norm
    siglip      -                   pre-norm    whole text         last token                 final_norm, head

SigLIP (arXiv 2303.15343) attends to padding and pools the last of it: its tokenizer pads every text to one length, and
here padding is text like any other. CLIP (arXiv 2103.00020) pads too, but no token sees what follows it.

BERT's token-type embedding is the same row for every token of a single text, so it has no parameter here:
weights/pretrained.py adds that row to the position embedding. BERT's pooler (a head of its pretraining) is left out.
Letters: n texts, total tokens of all of them, D width.
"""

import torch
from torch import Tensor, nn

from eclip.model.ragged import Kernel, Ragged, choose_kernel
from eclip.model.residual import LayerNorm, on_stream
from eclip.model.settings import ModelConfig
from eclip.model.transformer import PostNormBlock, PreNormBlock, init_transformer

TEXT_EPS = {"bert": 1e-12, "clip": 1e-5, "siglip": 1e-6}
"""Epsilon of the LayerNorms, by architecture."""


class TextEncoder(nn.Module):
    """Token ids to one vector a text: its first token's (`cls`), its `last` one's, or the `mean` over all."""

    kernel: Kernel | None = None
    """Of attention, see `set_text_attention`; None: padded."""
    residual_dtype: torch.dtype | None = None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, eps = config.text_width, TEXT_EPS[config.text_architecture]
        pre = config.text_architecture != "bert"
        self.config = config
        self.word_embedding = nn.Embedding(config.vocab_size, width)
        self.position_embedding = nn.Embedding(config.max_positions, width)
        self.norm = None if pre else LayerNorm(width, eps=eps)
        block = PreNormBlock if pre else PostNormBlock
        self.blocks = nn.ModuleList(
            block(width, config.text_heads, eps=eps, activation=config.text_activation)
            for _ in range(config.text_depth)
        )
        self.final_norm = nn.LayerNorm(width, eps=eps) if pre else None
        self.head = nn.Linear(width, width) if config.text_architecture == "siglip" else None
        self.apply(init_transformer)

    def hidden(self, tokens: Tensor, ragged: Ragged) -> Tensor:
        """tokens: (total,) int64. Returns the last block's packed output (total, D), before `final_norm`.

        Raises ValueError for a text longer than the position embedding.
        """
        if ragged.longest > self.config.max_positions:
            raise ValueError(
                f"a text of {ragged.longest} tokens is longer than max_positions={self.config.max_positions}; "
                f"lower --data.max-tokens or raise --model.max-positions"
            )
        embedded = self.word_embedding(tokens) + self.position_embedding(ragged.positions)
        x = on_stream(embedded, self.residual_dtype) if self.norm is None else self.norm(embedded)
        for block in self.blocks:
            x = block(x, ragged)
        return x if self.residual_dtype is None else x.to(embedded.dtype)

    def forward(self, tokens: Tensor, cu_seqlens: Tensor, *, longest: int | None = None) -> Tensor:
        """tokens: (total,) int64; cu_seqlens: (n+1,) int32, text s being tokens[cu_seqlens[s]:cu_seqlens[s+1]].

        longest: tokens of the longest text, or more; given, nothing is read from the device. Returns (n, D). Raises
        ValueError for one longer than max_positions, and, where longest is not given, for an empty text.
        """
        causal = self.config.text_architecture == "clip"
        ragged = Ragged.from_cu_seqlens(
            cu_seqlens, total=len(tokens), longest=longest, kernel=self.kernel, causal=causal
        )
        x = self.pool(self.hidden(tokens, ragged), ragged)
        if self.final_norm is not None:
            x = self.final_norm(x)
        return x if self.head is None else self.head(x)

    def pool(self, x: Tensor, ragged: Ragged) -> Tensor:
        """(total, D) -> (n, D)."""
        if self.config.text_pooling == "cls":
            return x.index_select(0, ragged.starts)
        if self.config.text_pooling == "last":
            return x.index_select(0, ragged.starts + ragged.lengths - 1)
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
            heads, causal = tower.config.text_heads, tower.config.text_architecture == "clip"
            head_dim = tower.config.text_width // heads
            tower.kernel = choose_kernel(choice, device, dtype, num_heads=heads, head_dim=head_dim, causal=causal)
            name = tower.kernel.name
    return name
