"""What slot attention is compared with: PyTorch as one would write it, in the inputs' dtype, the softmax in float32.

Not `slot_attention_reference`, which computes in float32 throughout: a bf16 kernel that beats it has beaten the dtype.
For the same reason the decoder runs in bf16 parameters and not under autocast, which would put its LayerNorms and every
cast of a weight on the bill. In float64 all of these are exact.

Letters: B images, N tokens, T queries, D channels, h heads.
"""

import math

import torch
from torch import Tensor

from eclip.kernels.slot_attention import slot_attention
from eclip.model.instance_decoder import InstanceBlock, InstanceDecoder

EPS = 1e-6


def compete(scores: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scores (..., T, N) to the weights in `dtype` and the assignment in at least float32."""
    assignment = scores.to(torch.promote_types(dtype, torch.float32)).softmax(-2)
    return (assignment / (assignment.sum(-1, keepdim=True) + EPS)).to(dtype), assignment


def eager_with_map(q: Tensor, tokens: Tensor, w_key: Tensor, w_value: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """Project the tokens, then attend: (B, T, D) and the assignment (B, h, T, N)."""
    k, v = tokens @ w_key.T, tokens @ w_value.T
    q, k, v = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q, k, v))
    weights, assignment = compete(q @ k.mT / math.sqrt(q.shape[-1]), v.dtype)
    return (weights @ v).transpose(1, 2).flatten(2), assignment


def eager(q: Tensor, tokens: Tensor, w_key: Tensor, w_value: Tensor, *, num_heads: int) -> Tensor:
    return eager_with_map(q, tokens, w_key, w_value, num_heads)[0]


def eager_core(q: Tensor, tokens: Tensor, scale: float) -> Tensor:
    """Queries (B, h, T, D) that are in token space already: scores and means alone."""
    batch, heads, queries, dim = q.shape
    scores = (q.flatten(1, 2) @ tokens.mT).view(batch, heads, queries, -1) * scale
    weights, _ = compete(scores, tokens.dtype)
    return (weights.flatten(1, 2) @ tokens).view(batch, heads, queries, dim)


def einsum(q: Tensor, tokens: Tensor, w_key: Tensor, w_value: Tensor, *, num_heads: int) -> Tensor:
    """The absorbed algebra: queries move into token space, the means move out of it."""
    w_key, w_value = (w.unflatten(0, (num_heads, -1)) for w in (w_key, w_value))
    moved = torch.einsum("bthd,hdc->bhtc", q.unflatten(-1, (num_heads, -1)), w_key)
    out = eager_core(moved, tokens, 1 / math.sqrt(q.shape[-1] // num_heads))
    return torch.einsum("bhtc,hdc->bthd", out, w_value).flatten(2)


def kv_fused(q: Tensor, tokens: Tensor, w_key: Tensor, w_value: Tensor, *, num_heads: int) -> Tensor:
    """Project the tokens in PyTorch, then our kernel on keys and values."""
    out = slot_attention(q, tokens @ w_key.T, tokens @ w_value.T, num_heads=num_heads)
    assert isinstance(out, Tensor)
    return out


def entropy(assignment: Tensor) -> Tensor:
    """-sum_t A ln A, mean over everything else."""
    return -(assignment * assignment.clamp_min(1e-38).log()).sum(-2).mean()


def eager_decoder(decoder: InstanceDecoder, tokens: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
    """Slots (B, T, D) and entropy of `decoder`, single-headed, with slot attention as `eager` computes it."""
    tokens = decoder.token_norm(tokens)
    slots = torch.zeros_like(queries)
    entropies = []
    for block in decoder.blocks:
        assert isinstance(block, InstanceBlock)
        update, assignment = eager_with_map(
            block.w_query(queries + slots), tokens, block.w_key.weight, block.w_value.weight, 1
        )
        slots = block.among_queries(block.norm(slots + block.w_out(update)))
        entropies.append(entropy(assignment))
    return slots, torch.stack(entropies).mean()
