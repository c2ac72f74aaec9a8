"""The peer: the same model and the same five losses, written plainly on transformers and torch.nn.

ViTModel and BertModel (scaled dot product attention, their default) on padded text; slot attention by einsum on
projected keys and values; nn.TransformerEncoderLayer among the queries; the whole matrix of logits and cross_entropy;
fused AdamW; the momentum model moved by a loop. So a practitioner would write it from the paper, with care and without
kernels of their own. On the same weights it gives our losses and gradients (tests/benchmarks/train_step/test_plain.py).

transformers is imported where a model is built: what needs it says so where it is missing.

Letters: B products, N patch tokens, T queries, D embedding width.
"""

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.train_step.batches import PaddedBatch
from eclip.config import RunConfig
from eclip.model.image_encoder import PIXEL_STATISTICS
from eclip.model.settings import ModelConfig
from eclip.objectives.settings import ObjectiveConfig

EPS = 1e-6


class SlotBlock(nn.Module):
    """Queries compete for tokens; then a post-norm transformer layer among the queries."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, activation="gelu", layer_norm_eps=EPS, batch_first=True
        )

    def forward(self, slots: Tensor, queries: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The next slots (B, T, D), and the entropy of the assignment."""
        q, k, v = self.query(queries + slots), self.key(tokens), self.value(tokens)
        scores = torch.einsum("btd,bnd->btn", q, k) / math.sqrt(q.shape[-1])
        shares = scores.float().softmax(dim=1) if scores.dtype != torch.float64 else scores.softmax(dim=1)
        entropy = -(shares * shares.clamp_min(1e-30).log()).sum(1).mean()
        weights = shares / (shares.sum(-1, keepdim=True) + EPS)
        update = torch.einsum("btn,bnd->btd", weights.to(v.dtype), v)
        return self.layer(self.norm(slots + self.out(update))), entropy


class PlainModel(nn.Module):
    """Two towers of transformers (none where their outputs are cached), projections, decoder, matching head."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: ModelConfig, *, image_tower: bool = True, text_tower: bool = True) -> None:
        super().__init__()
        width = config.embed_dim
        self.config = config
        self.vision = _vit(config) if image_tower else None
        self.text = _bert(config) if text_tower else None
        self.image_projection = nn.Linear(config.vision_width, width)
        self.text_projection = nn.Linear(config.text_width, width)
        self.position = nn.Parameter(torch.randn(config.num_queries, width) * 0.02)
        self.modality = nn.Embedding(2, width)
        self.token_norm = nn.LayerNorm(width, eps=EPS)
        self.blocks = nn.ModuleList(SlotBlock(width, config.decoder_heads) for _ in range(config.decoder_depth))
        self.match = nn.Linear(width, 2)
        self.logit_scale = nn.Parameter(torch.tensor(-math.log(0.07)))
        mean, std = PIXEL_STATISTICS[config.pixel_statistics]
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def encode(self, batch: PaddedBatch, view: int) -> tuple[Tensor, Tensor]:
        """Projected tokens (B, 1+N, D), CLS first, and titles (B, D)."""
        features = batch.features
        if self.vision is None:
            assert features is not None and features.images is not None
            image = features.images[:, view]
        else:
            assert batch.images is not None
            pixels = (batch.images[:, view].to(self.mean.dtype) / 255 - self.mean) / self.std
            image = self.vision(pixel_values=pixels).last_hidden_state
        if self.text is None:
            assert features is not None and features.texts is not None
            text = features.texts[:, view]
        else:
            mask = batch.attention_mask[view]
            hidden = self.text(input_ids=batch.input_ids[view], attention_mask=mask).last_hidden_state
            mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            text = hidden[:, 0] if self.config.text_pooling == "cls" else mean
        return self.image_projection(image), self.text_projection(text)

    def decode(self, tokens: Tensor, prompts: Tensor, modality: Tensor) -> tuple[Tensor, Tensor]:
        """tokens (B, N, D), prompts (B, T, D), modality (B, T): slots (B, T, D) and the mean entropy."""
        queries = F.normalize(prompts, dim=-1) * math.sqrt(prompts.shape[-1]) + self.position + self.modality(modality)
        tokens = self.token_norm(tokens)
        slots, entropies = torch.zeros_like(queries), []
        for block in self.blocks:
            slots, entropy = block(slots, queries, tokens)
            entropies.append(entropy)
        return slots, torch.stack(entropies).mean()


def _vit(config: ModelConfig) -> nn.Module:
    from transformers import ViTConfig, ViTModel

    settings = ViTConfig(
        hidden_size=config.vision_width,
        num_hidden_layers=config.vision_depth,
        num_attention_heads=config.vision_heads,
        intermediate_size=4 * config.vision_width,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        layer_norm_eps=config.vision_eps,
        image_size=config.image_size,
        patch_size=config.patch_size,
    )
    model: nn.Module = ViTModel(settings, add_pooling_layer=False)
    return model


def _bert(config: ModelConfig) -> nn.Module:
    from transformers import BertConfig, BertModel

    settings = BertConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.text_width,
        num_hidden_layers=config.text_depth,
        num_attention_heads=config.text_heads,
        intermediate_size=4 * config.text_width,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        max_position_embeddings=config.max_positions,
    )
    model: nn.Module = BertModel(settings, add_pooling_layer=False)
    return model


def unit(x: Tensor) -> Tensor:
    return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1)


def build_prompts(batch: PaddedBatch, texts: Tensor, images: Tensor, own_text: Tensor, own_image: Tensor) -> Tensor:
    """Prompts (B, T, D): of other products, or noise; the positive is the row's own."""
    draw, rows = batch.prompts, torch.arange(len(texts), device=texts.device)
    prompts = torch.where(draw.modality[..., None] == 1, images[draw.products], texts[draw.products])
    prompts = torch.where(draw.gaussian[:, None, None], batch.noise.to(prompts), prompts)
    own = torch.where(draw.modality[rows, draw.positive][:, None] == 1, own_image, own_text)
    return prompts.index_put((rows, draw.positive), own)


def compute_losses(
    model: PlainModel, momentum: PlainModel, batch: PaddedBatch, config: ObjectiveConfig, *, bf16: bool = False
) -> dict[str, Tensor]:
    """The five losses and their weighted sum; towers and decoders under bfloat16 autocast if asked for."""
    draw = batch.prompts
    rows = torch.arange(len(batch.products), device=batch.products.device)
    own = draw.own_image[:, None]
    with torch.autocast(batch.products.device.type, torch.bfloat16, enabled=bf16):
        image, text = model.encode(batch, 0)
        with torch.no_grad():
            image_b, text_b = momentum.encode(batch, 1)
            cls_a, cls_b = image[:, 0].detach(), image_b[:, 0]
            prompts = build_prompts(batch, text_b, cls_a, text_b, torch.where(own, cls_b, cls_a))
            keys = unit(momentum.decode(image_b[:, 1:], prompts, draw.modality)[0][rows, draw.positive])
        prompts = build_prompts(batch, text.detach(), cls_b, text, torch.where(own, cls_a, cls_b))
        slots, entropy = model.decode(image[:, 1:], prompts, draw.modality)
    cls, title, slots = unit(image[:, 0]), unit(text), unit(slots)
    instance = slots[rows, draw.positive]
    scale = model.logit_scale.exp()

    logits = scale * cls @ title.T
    same_title = batch.titles[:, None] == batch.titles
    labels = same_title / same_title.sum(1, keepdim=True)
    itc = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2

    same_product = (batch.products[:, None] == batch.products).fill_diagonal_(False)
    inter_logits = (instance @ keys.T / config.inter_temperature).masked_fill(same_product, -math.inf)
    inter = F.cross_entropy(inter_logits, rows)

    excluded = (batch.products[draw.products] == batch.products[:, None]) | (
        batch.titles[draw.products] == batch.titles[:, None]
    )
    excluded[rows, draw.positive] = False
    intra_logits = torch.einsum("btd,bd->bt", slots, title) / config.intra_temperature
    intra = F.cross_entropy(intra_logits.masked_fill(excluded, -math.inf), draw.positive)

    itm = matching_loss(model, instance, title, batch, excluded, scale.detach())
    losses = {"itc": itc, "inter": inter, "itm": itm, "intra": intra, "entropy": entropy}
    weights: dict[str, Any] = {name: getattr(config, f"{name}_weight") for name in losses}
    return {**losses, "loss": sum((weights[name] * losses[name] for name in losses), torch.zeros_like(itc))}


def matching_loss(
    model: PlainModel, instance: Tensor, title: Tensor, batch: PaddedBatch, excluded: Tensor, scale: Tensor
) -> Tensor:
    """Does the title belong to the instance? Its own does, a hard one of the prompts' titles does not."""
    draw, rows, width = batch.prompts, torch.arange(len(title), device=title.device), title.shape[-1]
    candidates = title.detach()[draw.products]
    with torch.no_grad():
        similarity = scale * torch.einsum("bd,btd->bt", instance, candidates)
        similarity[rows, draw.positive] = -math.inf
        similarity = similarity.masked_fill(excluded, -math.inf)
        hard = candidates[rows, (similarity + draw.gumbel).argmax(1)]
        usable = similarity.isfinite().any(1)
    ones = torch.ones_like(rows)
    matched = F.cross_entropy(model.match(instance * title * width), ones)
    unmatched = F.cross_entropy(model.match(instance * hard * width), 0 * ones, reduction="none")
    return (matched + (unmatched * usable).mean()) / 2


class PlainStep:
    """One training step at a call."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        """Raises ImportError where transformers is missing and a tower of it is wanted."""
        torch.manual_seed(config.seed)
        cached_texts = config.cache_features and config.lock_text
        with device:
            model = PlainModel(config.model, image_tower=not config.cache_features, text_tower=not cached_texts)
        self.model = model.to(device).train()
        self.momentum = copy.deepcopy(self.model).requires_grad_(False).eval()
        self.config, self.bf16 = config, config.bf16 and device.type == "cuda"
        matrices = [p for p in self.model.parameters() if p.ndim >= 2]
        vectors = [p for p in self.model.parameters() if p.ndim < 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": config.optim.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=config.optim.learning_rate,
            betas=(config.optim.beta1, config.optim.beta2),
            fused=True,  # what Hugging Face's Trainer takes by default
        )

    def __call__(self, batch: PaddedBatch) -> dict[str, Tensor]:
        """Losses, forward, backward, optimizer, momentum."""
        losses = compute_losses(self.model, self.momentum, batch, self.config.objective, bf16=self.bf16)
        losses["loss"].backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optim.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        decay = self.config.objective.ema_momentum
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, math.log(100))
            for target, source in zip(self.momentum.parameters(), self.model.parameters(), strict=True):
                target.mul_(decay).add_(source, alpha=1 - decay)
        return losses
