"""Slot attention: queries compete for tokens, then each query averages the tokens it won.

    S = scale * k q^T + bias        A = softmax of S over the T QUERIES        out_t = sum_n W_nt v_n

The softmax runs over queries, so it is local to a token; s_t = sum_n A_nt and A^T v are plain sums: one pass over the
tokens, no running maximum. W is A normalised over the tokens, in one of four ways (`normalize`):

    mean   (A + eps) / (s + N eps)   Locatello et al. 2020 (arXiv 2006.15055), DINOSAUR
    den    A / (s + eps)             SAVi; ECLIP (arXiv 2304.02853) equation 4 with eps in the denominator
    l1max  A / max(s, eps)           multi-head variants
    sum    A                         kMaX-DeepLab

A call, from the public function to the kernels and back (README.md says what each costs):

    functions.py  checks arguments by reference.py, splits heads or moves queries into token space; gives them to
    ops.py        `core`; in backward `core_backward`, then `token_gradients`, once for all calls that share the tokens
                  (ports.py). What is on no GPU, or not `supported` (options.py), is computed in PyTorch: plain.py
    forward.py    launches forward_one_pass.py or forward_general.py, and forward_common.py to add split tokens up
    backward.py   launches backward_scores.py: dq, db and the factors of dE; then backward_tokens.py: dE from factors
    options.py    blocks, warps and stages of every launch

Letters: B images, N tokens, T queries (TP: padded to a power of two), D channels, C channels of the tokens where they
differ, H heads, G groups (1: all heads read the same tokens; H: a slice each).
"""

from .functions import share_tokens, slot_attention, slot_attention_absorbed
from .options import MAX_KERNEL_DIM, MAX_KERNEL_QUERIES, supported
from .ports import TokenPort
from .reference import NORMALIZERS, slot_attention_absorbed_reference, slot_attention_reference

__all__ = [
    "MAX_KERNEL_DIM",
    "MAX_KERNEL_QUERIES",
    "NORMALIZERS",
    "TokenPort",
    "share_tokens",
    "slot_attention",
    "slot_attention_absorbed",
    "slot_attention_absorbed_reference",
    "slot_attention_reference",
    "supported",
]
