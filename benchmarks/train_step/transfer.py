"""Our weights in the peer's parameters, so that both can be compared."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from benchmarks.train_step.plain import PlainModel
from eclip.model.eclip import ECLIP

Pair = tuple[nn.Parameter, nn.Parameter, slice]
"""A parameter of the peer, the one of ours that holds it, and in which rows."""
WHOLE = slice(None)


@torch.no_grad()
def transfer(model: ECLIP, plain: PlainModel) -> None:
    """Copy every weight. BERT's token-type rows, which our model adds to its positions, become zero."""
    if plain.text is not None:
        plain.text.get_parameter("embeddings.token_type_embeddings.weight").zero_()
    for theirs, ours, rows in pairs(model, plain):
        theirs.copy_(ours[rows].view_as(theirs))


def gradients(model: ECLIP, plain: PlainModel) -> Iterator[tuple[Tensor, Tensor]]:
    """Gradients of the peer and of ours, where both have any, in one shape."""
    for theirs, ours, rows in pairs(model, plain):
        if theirs.grad is not None and ours.grad is not None:
            yield theirs.grad, ours.grad[rows].view_as(theirs)


def pairs(model: ECLIP, plain: PlainModel) -> Iterator[Pair]:
    """Every parameter of the peer with ours."""
    if plain.vision is not None:
        yield from _vision(model.image_encoder, plain.vision)
    if plain.text is not None:
        yield from _text(model.text_encoder, plain.text)
    yield from _all(plain.image_projection, model.image_projection)
    yield from _all(plain.text_projection, model.text_projection)
    yield plain.position, model.queries.position, WHOLE
    yield plain.get_parameter("modality.weight"), model.queries.modality, WHOLE
    yield from _all(plain.token_norm, model.instance_decoder.token_norm)
    for theirs, ours in zip(plain.blocks, model.instance_decoder.blocks, strict=True):
        yield from _block(theirs, ours)
    yield from _all(plain.match, model.matching_head)
    yield plain.logit_scale, model.logit_scale, WHOLE


def _all(theirs: nn.Module, ours: nn.Module) -> Iterator[Pair]:
    yield from ((p, ours.get_parameter(name), WHOLE) for name, p in theirs.named_parameters())


def _attention(theirs: nn.Module, names: tuple[str, str, str], ours: nn.Module) -> Iterator[Pair]:
    """Query, key and value of the peer are three modules, ours one."""
    for i, name in enumerate(names):
        for kind, p in theirs.get_submodule(name).named_parameters():
            yield p, ours.get_parameter(f"qkv.{kind}"), slice(i * len(p), (i + 1) * len(p))


def _vision(ours: nn.Module, theirs: nn.Module) -> Iterator[Pair]:
    yield theirs.get_parameter("embeddings.cls_token"), ours.get_parameter("cls_token"), WHOLE
    yield theirs.get_parameter("embeddings.position_embeddings"), ours.get_parameter("pos_embed"), WHOLE
    yield from _all(
        theirs.get_submodule("embeddings.patch_embeddings.projection"), ours.get_submodule("patch_embed.proj")
    )
    yield from _all(theirs.get_submodule("layernorm"), ours.get_submodule("norm"))
    blocks, layers = ours.get_submodule("blocks"), theirs.get_submodule("layers")
    for i in range(len(list(blocks.children()))):
        block, layer = blocks.get_submodule(str(i)), layers.get_submodule(str(i))
        names = ("attention.q_proj", "attention.k_proj", "attention.v_proj")
        yield from _attention(layer, names, block.get_submodule("attn"))
        for their_name, our_name in (
            ("attention.o_proj", "attn.proj"),
            ("layernorm_before", "norm1"),
            ("layernorm_after", "norm2"),
            ("mlp", "mlp"),
        ):
            yield from _all(layer.get_submodule(their_name), block.get_submodule(our_name))


def _text(ours: nn.Module, theirs: nn.Module) -> Iterator[Pair]:
    for their_name, our_name in (
        ("word_embeddings", "word_embedding"),
        ("position_embeddings", "position_embedding"),
        ("LayerNorm", "norm"),
    ):
        yield from _all(theirs.get_submodule(f"embeddings.{their_name}"), ours.get_submodule(our_name))
    blocks = ours.get_submodule("blocks")
    for i in range(len(list(blocks.children()))):
        layer, block = theirs.get_submodule(f"encoder.layer.{i}"), blocks.get_submodule(str(i))
        names = ("attention.self.query", "attention.self.key", "attention.self.value")
        yield from _attention(layer, names, block.get_submodule("attn"))
        for their_name, our_name in (
            ("attention.output.dense", "attn.proj"),
            ("attention.output.LayerNorm", "norm1"),
            ("intermediate.dense", "mlp.fc1"),
            ("output.dense", "mlp.fc2"),
            ("output.LayerNorm", "norm2"),
        ):
            yield from _all(layer.get_submodule(their_name), block.get_submodule(our_name))


def _block(theirs: nn.Module, ours: nn.Module) -> Iterator[Pair]:
    for their_name, our_name in (
        ("query", "w_query"),
        ("key", "w_key"),
        ("value", "w_value"),
        ("out", "w_out"),
        ("norm", "norm"),
        ("layer.self_attn.out_proj", "among_queries.attn.proj"),
        ("layer.linear1", "among_queries.mlp.fc1"),
        ("layer.linear2", "among_queries.mlp.fc2"),
        ("layer.norm1", "among_queries.norm1"),
        ("layer.norm2", "among_queries.norm2"),
    ):
        yield from _all(theirs.get_submodule(their_name), ours.get_submodule(our_name))
    for kind in ("weight", "bias"):
        yield (
            theirs.get_parameter(f"layer.self_attn.in_proj_{kind}"),
            ours.get_parameter(f"among_queries.attn.qkv.{kind}"),
            WHOLE,
        )
