"""Slot attention: queries compete for tokens, then each query averages the tokens it won."""

from .functions import (
    MAX_KERNEL_DIM,
    NORMALIZERS,
    TokenPort,
    share_tokens,
    slot_attention,
    slot_attention_absorbed,
    slot_attention_absorbed_reference,
    slot_attention_reference,
)

__all__ = [
    "MAX_KERNEL_DIM",
    "NORMALIZERS",
    "TokenPort",
    "share_tokens",
    "slot_attention",
    "slot_attention_absorbed",
    "slot_attention_absorbed_reference",
    "slot_attention_reference",
]
