"""Random calls of both ops, beside the listed ones: shapes, dtypes and options that nobody thought of."""

import random

from .calls import DTYPES, Call
from .contrastive_calls import ContrastiveCall
from .slot_attention_calls import SlotAttentionCall


def draw(count: int, seed: int) -> list[Call]:
    """`count` valid calls, two of slot attention for one of the losses; the same for the same seed."""
    chance = random.Random(seed)
    return [_contrastive(chance) if i % 3 == 2 else _slot_attention(chance) for i in range(count)]


def _flag(chance: random.Random) -> bool:
    return chance.random() < 0.4


def _slot_attention(chance: random.Random) -> Call:
    heads = chance.choice((1, 1, 1, 4, 12))
    kind = chance.choice(("raw", "raw", "norm", "separate"))
    # Channels in eights, as towers have them, or any number: rows without alignment.
    dim = 8 * chance.randint(1, 256) if chance.random() < 0.8 else chance.randint(1, 2048)
    return SlotAttentionCall(
        queries=chance.choice((chance.randint(1, 64), 20)),
        tokens=chance.choice((49, 196, 256, 576, chance.randint(1, 1024))),
        dim=dim,
        dtype=chance.choice(DTYPES),
        batch=chance.choice((1, 8, 64, 1000)),
        heads=heads,
        groups=chance.choice((1, heads)),
        separate=kind == "separate",
        norm=kind == "norm",
        normalize=chance.choice(("mean", "den", "l1max", "sum")),
        bias=_flag(chance),
        mask=_flag(chance),
        map=_flag(chance),
        entropy=_flag(chance),
        mass=_flag(chance),
        calls=chance.choice((1, 1, 2, 6)),
    )


def _contrastive(chance: random.Random) -> Call:
    dtype = chance.choice(DTYPES)
    sides = chance.choice(("both", "rows", "sigmoid"))
    images = chance.choice((chance.randint(1, 4096), 32768))
    positives = chance.choice(("diagonal", "all", "mask"))
    more_texts = chance.choice((0, 0, chance.randint(1, 4096)))
    frozen = chance.choice(("nothing", "nothing", "images", "texts"))
    return ContrastiveCall(
        images=images,
        texts=images + (0 if sides == "both" and positives == "all" else more_texts),
        dim=chance.choice((64, 256, 512, 768, 1024, chance.randint(1, 1024))),
        dtype=dtype,
        sides=sides,
        positives=positives,
        bias=_flag(chance),
        kept=dtype == "bfloat16" and sides != "sigmoid" and _flag(chance),
        frozen_images=frozen == "images",
        frozen_texts=frozen == "texts",
    )
