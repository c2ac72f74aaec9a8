"""A call of an op as a line of text, "slot_attention queries=33 dim=1000", to print it and to repeat it."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from .contrastive_calls import CONTRASTIVE_CALLS, ContrastiveCall
from .slot_attention_calls import SLOT_ATTENTION_CALLS, SlotAttentionCall

OPS: dict[str, type[SlotAttentionCall] | type[ContrastiveCall]] = {
    "slot_attention": SlotAttentionCall,
    "contrastive": ContrastiveCall,
}
Call = SlotAttentionCall | ContrastiveCall
DTYPES = ("bfloat16", "float16", "float32")
"""Of the kernels' operands, by torch's names."""
LISTED: Sequence[Call] = (*SLOT_ATTENTION_CALLS, *CONTRASTIVE_CALLS)


def describe(call: Call) -> str:
    """The op and what differs from its defaults; a flag that is set by its name alone."""
    op = next(name for name, kind in OPS.items() if isinstance(call, kind))
    words = [op]
    for item in fields(call):
        value = getattr(call, item.name)
        if value != item.default:
            words.append(item.name if value is True else f"{item.name}={value}")
    return " ".join(words)


def parse(text: str) -> Call:
    """The call that `describe` describes so. Raises ValueError with the names that there are."""
    op, *words = text.split() or [""]
    if op not in OPS:
        raise ValueError(f"{op!r} is no op; a call starts with one of {', '.join(OPS)}")
    defaults: dict[str, Any] = {item.name: item.default for item in fields(OPS[op])}
    chosen: dict[str, Any] = {}
    for word in words:
        name, _, value = word.partition("=")
        if name not in defaults:
            raise ValueError(f"{name!r} is nothing that {op} takes; choose from {', '.join(defaults)}")
        kind = type(defaults[name])
        try:
            chosen[name] = value in ("", "True") if kind is bool else kind(value)
        except ValueError:
            raise ValueError(f"{word}: {name} is a whole number; write {name}={defaults[name]}") from None
        if name == "dtype" and value not in DTYPES:
            raise ValueError(f"{word}: choose from {', '.join(DTYPES)}")
    return OPS[op](**chosen)
