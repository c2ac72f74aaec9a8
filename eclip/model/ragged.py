"""Ragged text: sequences of any length packed into (total, D) rows, and self-attention inside each of them.

Letters: n sequences, H heads, D width, total = rows of all sequences.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Ragged:
    """Where the rows of a packed (total, D) batch of n sequences lie in its padded (n, longest) form."""

    rows: Tensor
    """(total,) int64: row of token i in the flattened padded form."""
    present: Tensor
    """(n, longest) bool: False where the padded form holds no token."""
    starts: Tensor
    """(n,) int64: packed row of each sequence's first token."""
    lengths: Tensor
    """(n,) int64."""
    positions: Tensor
    """(total,) int64: position of token i in its sequence."""
    sequence: Tensor
    """(total,) int64: sequence of token i."""

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Tensor, *, total: int | None = None, longest: int | None = None) -> "Ragged":
        """cu_seqlens: (n+1,) integers, 0 first, not decreasing; sequence s is rows cu_seqlens[s]:cu_seqlens[s+1].

        total, longest: cu_seqlens[-1], and a length that no sequence exceeds, for who knows them. Where longest is not
        given it is read from the tensor, for which a GPU is waited for; and only then is it seen, and ValueError
        raised, when a sequence is empty: it has no token to pool.
        """
        bounds = cu_seqlens.to(torch.int64)
        starts, lengths = bounds[:-1], bounds.diff()
        empty = lengths.numel() == 0
        if longest is None and not empty:
            shortest, longest = torch.stack(torch.aminmax(lengths)).tolist()
            empty = shortest < 1
        if empty or longest is None:
            raise ValueError("cu_seqlens describes an empty text; every text needs at least one token ([CLS], [SEP])")
        numbers = torch.arange(len(lengths), device=bounds.device)
        sequence = torch.repeat_interleave(numbers, lengths, output_size=total)
        positions = torch.arange(len(sequence), device=bounds.device) - starts[sequence]
        present = torch.arange(longest, device=bounds.device) < lengths[:, None]
        return cls(sequence * longest + positions, present, starts, lengths, positions, sequence)


def attend_ragged(q: Tensor, k: Tensor, v: Tensor, ragged: Ragged) -> Tensor:
    """Self-attention inside each sequence of a packed batch: pad, attend under a mask, pack again.

    q, k, v: (total, H, head_dim). Returns (total, H, head_dim). This is where a variable-length GPU kernel would enter:
    it takes the same packed rows and cu_seqlens, and nothing else in the model sees padding.
    """
    n, longest = ragged.present.shape

    def pad(x: Tensor) -> Tensor:
        padded = x.new_zeros(n * longest, *x.shape[1:]).index_copy(0, ragged.rows, x)
        return padded.view(n, longest, *x.shape[1:]).transpose(1, 2)

    mask = ragged.present[:, None, None, :]
    out = F.scaled_dot_product_attention(pad(q), pad(k), pad(v), attn_mask=mask)
    return out.transpose(1, 2).flatten(0, 1).index_select(0, ragged.rows)
