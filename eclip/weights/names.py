"""What the towers' tensors are called in files of other programs, one table a naming scheme.

Each table maps a parameter of our encoders (timm's names for images) to the names it may have; `#` is a block's number.
A scheme is told by a tensor that every file of it has and no other (`IMAGE_FAMILIES`, `TEXT_FAMILIES`), and has names
that belong to no tower: heads of pretraining and classification, constants.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

Names = Mapping[str, tuple[str, ...]]
"""Our parameters and the names they may have in a file; `#` is the block's number."""

_HEADS = r"pooler\.|head|classifier\.|cls\.|(embeddings\.)?mask_token$|embeddings\.position_ids$"


@dataclass(frozen=True)
class Family:
    """A naming scheme."""

    names: Names
    unused: re.Pattern[str] = re.compile(_HEADS)
    """How names begin that belong to no tower."""


def _blocks(prefixes: tuple[str, ...], names: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    return {f"blocks.#.{ours}": tuple(p + n for p in prefixes for n in theirs) for ours, theirs in names.items()}


# The second spelling of each pair is that of the modules in transformers 5, the first that of files on disk.
HUGGING_FACE_VIT: Names = {
    "cls_token": ("embeddings.cls_token",),
    "pos_embed": ("embeddings.position_embeddings",),
    "patch_embed.proj": ("embeddings.patch_embeddings.projection",),
    "norm": ("layernorm",),
    **_blocks(
        ("encoder.layer.#.", "layers.#."),
        {
            "norm1": ("layernorm_before", "norm1"),
            "attn.q": ("attention.attention.query", "attention.q_proj"),
            "attn.k": ("attention.attention.key", "attention.k_proj"),
            "attn.v": ("attention.attention.value", "attention.v_proj"),
            "attn.proj": ("attention.output.dense", "attention.o_proj"),
            "ls1.gamma": ("layer_scale1.lambda1",),
            "norm2": ("layernorm_after", "norm2"),
            "mlp.fc1": ("intermediate.dense", "mlp.fc1"),
            "mlp.fc2": ("output.dense", "mlp.fc2"),
            "ls2.gamma": ("layer_scale2.lambda1",),
        },
    ),
}
HUGGING_FACE_BERT: Names = {
    "word_embedding": ("embeddings.word_embeddings",),
    "position_embedding": ("embeddings.position_embeddings",),
    "norm": ("embeddings.LayerNorm",),
    **_blocks(
        ("encoder.layer.#.",),
        {
            "attn.q": ("attention.self.query",),
            "attn.k": ("attention.self.key",),
            "attn.v": ("attention.self.value",),
            "attn.proj": ("attention.output.dense",),
            "norm1": ("attention.output.LayerNorm",),
            "mlp.fc1": ("intermediate.dense",),
            "mlp.fc2": ("output.dense",),
            "norm2": ("output.LayerNorm",),
        },
    ),
}
OWN: Names = {}
"""Our own names: timm's of images; also those of a tower saved from this model."""

# One encoder serves both towers of CLIP and of SigLIP.
_HUGGING_FACE_CLIP_BLOCKS = _blocks(
    ("encoder.layers.#.",),
    {
        "norm1": ("layer_norm1",),
        "attn.q": ("self_attn.q_proj",),
        "attn.k": ("self_attn.k_proj",),
        "attn.v": ("self_attn.v_proj",),
        "attn.proj": ("self_attn.out_proj",),
        "norm2": ("layer_norm2",),
        "mlp.fc1": ("mlp.fc1",),
        "mlp.fc2": ("mlp.fc2",),
    },
)
HUGGING_FACE_CLIP_IMAGE: Names = {
    "cls_token": ("embeddings.class_embedding",),
    "pos_embed": ("embeddings.position_embedding.weight",),
    "patch_embed.proj": ("embeddings.patch_embedding",),
    "norm_pre": ("pre_layrnorm",),  # so spelled there
    "norm": ("post_layernorm",),
    "attn_pool.latent": ("head.probe",),
    "attn_pool.qkv.weight": ("head.attention.in_proj_weight",),
    "attn_pool.qkv.bias": ("head.attention.in_proj_bias",),
    "attn_pool.proj": ("head.attention.out_proj",),
    "attn_pool.norm": ("head.layernorm",),
    "attn_pool.mlp.fc1": ("head.mlp.fc1",),
    "attn_pool.mlp.fc2": ("head.mlp.fc2",),
    **_HUGGING_FACE_CLIP_BLOCKS,
}
HUGGING_FACE_CLIP_TEXT: Names = {
    "word_embedding": ("embeddings.token_embedding",),
    "position_embedding": ("embeddings.position_embedding",),
    "final_norm": ("final_layer_norm",),
    "head": ("head",),
    **_HUGGING_FACE_CLIP_BLOCKS,
}
_OPENAI_BLOCKS = _blocks(
    ("transformer.resblocks.#.",),
    {
        "norm1": ("ln_1",),
        "attn.qkv.weight": ("attn.in_proj_weight",),
        "attn.qkv.bias": ("attn.in_proj_bias",),
        "attn.proj": ("attn.out_proj",),
        "norm2": ("ln_2",),
        "mlp.fc1": ("mlp.c_fc",),
        "mlp.fc2": ("mlp.c_proj",),
    },
)
OPENAI_IMAGE: Names = {
    "cls_token": ("class_embedding",),
    "pos_embed": ("positional_embedding",),
    "patch_embed.proj": ("conv1",),
    "norm_pre": ("ln_pre",),
    "norm": ("ln_post",),
    **_OPENAI_BLOCKS,
}
OPENAI_TEXT: Names = {
    "word_embedding": ("token_embedding",),
    "position_embedding.weight": ("positional_embedding",),
    "final_norm": ("ln_final",),
    "head": ("text_projection",),  # open_clip's SigLIP; a CLIP's is one matrix, of that very name
    **_OPENAI_BLOCKS,
}

# Of a text tower that stands at the top of the file, beside the image tower and the temperature.
_OPENAI_REST = re.compile(
    r"visual\.|logit_scale$|logit_bias$|attn_mask$|text_projection$|input_resolution$|context_length$|vocab_size$"
)
_CONSTANTS = re.compile(r"embeddings\.position_ids$|classifier\.")

IMAGE_FAMILIES: dict[str, Family] = {
    "embeddings.patch_embeddings.projection.weight": Family(HUGGING_FACE_VIT),
    "patch_embed.proj.weight": Family(OWN),
    "embeddings.patch_embedding.weight": Family(HUGGING_FACE_CLIP_IMAGE, _CONSTANTS),
    "ln_pre.weight": Family(OPENAI_IMAGE, re.compile(r"proj$")),
}
"""By a tensor that tells the scheme."""
TEXT_FAMILIES: dict[str, Family] = {
    "embeddings.word_embeddings.weight": Family(HUGGING_FACE_BERT),
    "word_embedding.weight": Family(OWN),
    "embeddings.token_embedding.weight": Family(HUGGING_FACE_CLIP_TEXT, _CONSTANTS),
    "ln_final.weight": Family(OPENAI_TEXT, _OPENAI_REST),
}
