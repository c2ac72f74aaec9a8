"""The instance decoder of ECLIP (arXiv 2304.02853, section 3.2): queries divide an image's tokens among themselves.

    Q_t  = prompt_t + pos_t + type_t                                     instance queries
    M    = (Z W_z) ((Q + H) W_q)^T / sqrt(D)                             N x T scores, H^0 = 0
    A    = softmax of M over the T queries                               each token is shared out
    dH_t = sum_i A_it W_v z_i / sum_i A_it
    H    = norm(H + W_o dH), then self-attention among the queries and an FFN of width 4D, each with add & norm

Q is added again at every block but enters through M alone, so the output slots hold nothing but image content. M, A and
dH are one call of `slot_attention_absorbed`, which never builds Z W_z or Z W_v, and the gradient of Z is written once
for all blocks.

Where the paper is silent, this is what we chose:
- Prompts are scaled to length sqrt(D), that of a standard normal vector: the outputs of g_T and g_I grow freely in
  training, and at inference the negative prompts are drawn from N(0, I).
- One LayerNorm of the tokens before the first block (ModelConfig.token_norm), and W_z, W_q, W_v, W_o drawn with
  standard deviation 1/sqrt(D): scores start with a deviation near 1 whatever the tower's scale.

Letters: B images, N patch tokens, T queries, D width.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eclip.kernels.launch import accumulate_dtype
from eclip.kernels.slot_attention import (
    TokenPort,
    share_tokens,
    slot_attention,
    slot_attention_absorbed,
    slot_attention_absorbed_reference,
)
from eclip.model.residual import LayerNorm, on_stream
from eclip.model.settings import ModelConfig
from eclip.model.transformer import PostNormBlock, init_transformer

DECODER_EPS = 1e-6
TEXT, IMAGE = 0, 1
"""The two modalities of a prompt, rows of the type embedding."""


@dataclass(frozen=True)
class DecoderOutput:
    """What the decoder saw in each image through each query."""

    slots: Tensor
    """(B, T, D) H^L: instance features, not normalised."""
    entropy: Tensor
    """Scalar, L_R: -sum_t A log A, mean over tokens, blocks and images. log T at most. float32, float64 in float64."""
    assignment: Tensor | None
    """(B, T, N) float32, detached: A of the last block (mean of slot heads), the share of token n taken by query t.
    None unless asked for."""


class InstanceQueries(nn.Module):
    """Prompts to queries: unit prompt * sqrt(D) + position + modality type."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.empty(config.num_queries, config.embed_dim))
        self.modality = nn.Parameter(torch.empty(2, config.embed_dim))
        nn.init.trunc_normal_(self.position, std=0.02)
        nn.init.trunc_normal_(self.modality, std=0.02)

    def forward(self, prompts: Tensor, modality: Tensor) -> Tensor:
        """prompts: (B, T, D), any length; modality: (B, T) int64, TEXT or IMAGE. Returns (B, T, D).

        Raises ValueError when there are not num_queries prompts an image.
        """
        if prompts.shape[1:] != self.position.shape or modality.shape != prompts.shape[:2]:
            raise ValueError(
                f"prompts of shape {tuple(prompts.shape)} with modalities {tuple(modality.shape)}: this model takes "
                f"(B, {', '.join(map(str, self.position.shape))}) and (B, {self.position.shape[0]})"
            )
        prompts = F.normalize(prompts, dim=-1) * prompts.shape[-1] ** 0.5
        return prompts + self.position + self.modality[modality]


class InstanceBlock(nn.Module):
    """Slot attention over the tokens, then self-attention among the queries, then the FFN; post-norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.embed_dim
        self.config = config
        self.w_query = nn.Linear(width, width, bias=False)
        self.w_key = nn.Linear(width, width, bias=False)
        self.w_value = nn.Linear(width, width, bias=False)
        self.w_out = nn.Linear(width, width, bias=False)
        self.norm = LayerNorm(width, eps=DECODER_EPS)
        self.among_queries = PostNormBlock(width, config.decoder_heads, eps=DECODER_EPS)
        self.among_queries.apply(init_transformer)
        self._start_as_identity()

    @torch.no_grad()
    def _start_as_identity(self) -> None:
        nn.init.orthogonal_(self.w_key.weight)
        self.w_query.weight.copy_(self.w_key.weight)
        nn.init.orthogonal_(self.w_value.weight)
        self.w_out.weight.copy_(self.w_value.weight.T)
        for last in (self.among_queries.attn.proj, self.among_queries.mlp.fc2):
            last.weight.mul_(0.1)

    def forward(
        self, slots: Tensor, queries: Tensor, tokens: Tensor, port: TokenPort | None = None, return_map: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """slots, queries: (B, T, D); tokens: (B, N, D), and where their gradient goes if not to them (`share_tokens`).

        Returns the next slots, the entropy of A as (B, H), summed over tokens, and A (B, H, T, N) if asked for.
        """
        update, *assignment, entropy = self._attend(
            self.w_query(queries + slots),
            tokens,
            port,
            num_heads=self.config.slot_heads,
            normalize=self.config.normalize,
            eps=self.config.slot_eps,
            return_map=return_map,
            return_entropy=True,
        )
        slots = self.among_queries(self.norm(slots + self.w_out(update)))
        return slots, entropy, assignment[0] if return_map else None

    def _attend(self, queries: Tensor, tokens: Tensor, port: TokenPort | None, **options: Any) -> tuple[Tensor, ...]:
        weights = self.w_key.weight, self.w_value.weight
        if self.config.kernels == "reference":
            found = slot_attention_absorbed_reference(queries, tokens, *weights, **options)
        elif self.config.absorbs_projections:
            found = slot_attention_absorbed(queries, tokens, *weights, port=port, **options)
        else:
            found = slot_attention(queries, self.w_key(tokens), self.w_value(tokens), **options)
        assert isinstance(found, tuple)
        return found


class InstanceDecoder(nn.Module):
    """L blocks over the same queries and tokens."""

    residual_dtype: torch.dtype | None = None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.decoder_depth < 1:
            raise ValueError(f"decoder_depth={config.decoder_depth}: the instance decoder needs at least one block")
        self.config = config
        self.token_norm = LayerNorm(config.embed_dim, eps=DECODER_EPS) if config.token_norm else nn.Identity()
        self.blocks = nn.ModuleList(InstanceBlock(config) for _ in range(config.decoder_depth))

    def forward(self, tokens: Tensor, queries: Tensor, *, return_map: bool = False) -> DecoderOutput:
        """tokens: (B, N, D) projected patch tokens without CLS; queries: (B, T, D). Source: equations 1-5.

        return_map: fill `assignment` too, which costs a (B, T, N) tensor.
        """
        tokens, ports = self._share(self.token_norm(tokens), queries.shape[1])
        dtype, queries = queries.dtype, on_stream(queries, self.residual_dtype)
        slots, assignment = torch.zeros_like(queries), None
        entropies = []
        for block, port in zip(self.blocks, ports, strict=True):
            wanted = return_map and block is self.blocks[-1]
            slots, entropy, assignment = block(slots, queries, tokens, port, wanted)
            entropies.append(entropy.to(accumulate_dtype(entropy.dtype)).mean() / tokens.shape[1])
        if assignment is not None:
            assignment = assignment.detach().float()
            assignment = assignment if assignment.ndim == 3 else assignment.mean(dim=1)
        slots = slots if self.residual_dtype is None else slots.to(dtype)
        return DecoderOutput(slots, torch.stack(entropies).mean(), assignment)

    def _share(self, tokens: Tensor, num_queries: int) -> tuple[Tensor, list[TokenPort] | list[None]]:
        if self.config.kernels == "reference" or not self.config.absorbs_projections:
            return tokens, [None] * len(self.blocks)
        return share_tokens(tokens, len(self.blocks), num_queries=num_queries, num_heads=self.config.slot_heads)
