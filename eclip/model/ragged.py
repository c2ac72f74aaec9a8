"""Ragged text: sequences of any length packed into (total, D) rows, and self-attention inside each of them.

Three kernels compute that attention, in order of preference:

    varlen     torch.nn.attention.varlen: Flash Attention on the packed rows; half precision, GPUs from Ampere on
    xformers   its memory-efficient attention under a BlockDiagonalMask, on the packed rows; older GPUs and float32 too
    padded     scaled_dot_product_attention of padded sequences under a mask; anywhere

`choose_kernel` tries them on a device, once; `TextEncoder` holds the choice. None reads a value from the device. All
three know two forms: a token attends to its whole sequence (BERT, SigLIP), or to itself and earlier ones (CLIP).

Letters: n sequences, H heads, D width, total = rows of all sequences.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Kernel:
    """What computes attention where its inputs are of this device and dtype; elsewhere they are padded."""

    name: str
    """Key of KERNELS."""
    device: str
    """Its type."""
    dtype: torch.dtype


@dataclass(frozen=True)
class Ragged:
    """Where the rows of a packed (total, D) batch of n sequences lie in its padded (n, longest) form."""

    bounds: Tensor
    """(n+1,) int32: sequence s is rows bounds[s]:bounds[s+1]."""
    longest: int
    """No sequence is longer."""
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
    kernel: Kernel | None = None
    """What attention is computed by; None: padded."""
    causal: bool = False
    """Whether a token attends to itself and earlier ones alone."""

    @classmethod
    def from_cu_seqlens(
        cls,
        cu_seqlens: Tensor,
        *,
        total: int | None = None,
        longest: int | None = None,
        kernel: Kernel | None = None,
        causal: bool = False,
    ) -> "Ragged":
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
        return cls(
            bounds=cu_seqlens.to(torch.int32),
            longest=longest,
            rows=sequence * longest + positions,
            present=torch.arange(longest, device=bounds.device) < lengths[:, None],
            starts=starts,
            lengths=lengths,
            positions=positions,
            sequence=sequence,
            kernel=kernel,
            causal=causal,
        )


def attend_ragged(q: Tensor, k: Tensor, v: Tensor, ragged: Ragged) -> Tensor:
    """Self-attention inside each sequence of a packed batch, by `ragged.kernel`.

    q, k, v: (total, H, head_dim). Returns (total, H, head_dim).
    """
    kernel = ragged.kernel
    if kernel is None or (q.device.type, q.dtype) != (kernel.device, kernel.dtype):
        return attend_padded(q, k, v, ragged)
    return KERNELS[kernel.name](q, k, v, ragged)


def attend_padded(q: Tensor, k: Tensor, v: Tensor, ragged: Ragged) -> Tensor:
    """Pad, attend under a mask, pack again."""
    n, longest = ragged.present.shape

    def pad(x: Tensor) -> Tensor:
        padded = x.new_zeros(n * longest, *x.shape[1:]).index_copy(0, ragged.rows, x)
        return padded.view(n, longest, *x.shape[1:]).transpose(1, 2)

    # Padding comes last: a causal token meets none, and needs no other mask.
    mask = None if ragged.causal else ragged.present[:, None, None, :]
    out = F.scaled_dot_product_attention(pad(q), pad(k), pad(v), attn_mask=mask, is_causal=ragged.causal)
    return out.transpose(1, 2).flatten(0, 1).index_select(0, ragged.rows)


def attend_varlen(q: Tensor, k: Tensor, v: Tensor, ragged: Ragged) -> Tensor:
    """Flash Attention of PyTorch, on the packed rows."""
    from torch.nn.attention.varlen import varlen_attn

    # The first seven are positional in every version; what follows has changed between them.
    options = causal_options(varlen_attn) if ragged.causal else {}
    out = varlen_attn(q, k, v, ragged.bounds, ragged.bounds, ragged.longest, ragged.longest, **options)
    assert isinstance(out, Tensor)
    return out


@functools.cache
def causal_options(varlen_attn: Callable[..., object]) -> dict[str, Any]:
    """How this version is told to attend to earlier tokens alone: by a switch, or by a window as torch 2.13 has it."""
    if "is_causal" in inspect.signature(varlen_attn).parameters:
        return {"is_causal": True}
    return {"window_size": (-1, 0)}


def attend_xformers(q: Tensor, k: Tensor, v: Tensor, ragged: Ragged) -> Tensor:
    """xformers' memory-efficient attention, on the packed rows."""
    from xformers.ops import memory_efficient_attention

    mask = block_diagonal_mask(ragged)
    out: Tensor = memory_efficient_attention(q[None], k[None], v[None], attn_bias=mask)
    return out[0]


def block_diagonal_mask(ragged: Ragged) -> object:
    """xformers' mask of these sequences; all but its `materialize` and `split` can be used.

    `BlockDiagonalMask.from_seqlens` wants the lengths on the host. The kernels take their bounds on the device and the
    longest length; the host's list of bounds is for those two methods.
    """
    from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask, BlockDiagonalMask, _SeqLenInfo

    total = len(ragged.rows)
    info = _SeqLenInfo(seqstart=ragged.bounds, max_seqlen=ragged.longest, min_seqlen=1, seqstart_py=[0, total])
    kind = BlockDiagonalCausalMask if ragged.causal else BlockDiagonalMask
    return kind(q_seqinfo=info, k_seqinfo=info)


KERNELS = {"varlen": attend_varlen, "xformers": attend_xformers, "padded": attend_padded}


def choose_kernel(
    choice: str, device: torch.device, dtype: torch.dtype, *, num_heads: int, head_dim: int, causal: bool = False
) -> Kernel:
    """The kernel named `choice`, or with "auto" the first that works on `device` for `dtype` and heads like these.

    causal: whether it has to attend to earlier tokens alone.
    Raises ValueError where the one that is asked for does not work.
    """
    for name in KERNELS if choice == "auto" else (choice,):
        if name == "padded":
            why_not = None
        elif device.type != "cuda":  # not even imported: xformers takes seconds and warns at length
            why_not = "it needs a CUDA GPU"
        else:
            why_not = fails(name, device, dtype, num_heads, head_dim, causal=causal)
        if why_not is None:
            return Kernel(name, device.type, dtype)
        if name == choice:
            raise ValueError(
                f"--text-attention {choice} does not work on {device} for {num_heads} heads of {head_dim} in "
                f"{str(dtype).removeprefix('torch.')}: {why_not}; use auto, which takes what works, or padded"
            )
    raise AssertionError("padded attention works everywhere")


def fails(
    name: str, device: torch.device, dtype: torch.dtype, num_heads: int, head_dim: int, *, causal: bool = False
) -> str | None:
    """Try a kernel, forward and backward, on rows laid out as in `Attention`. Returns None, or what is wrong."""
    ragged = Ragged.from_cu_seqlens(torch.tensor([0, 2, 3, 8], device=device), total=8, longest=5, causal=causal)
    results = []
    try:
        for attend in (KERNELS[name], attend_padded):
            numbers = torch.arange(8 * 3 * num_heads * head_dim, device=device).sin().to(dtype)
            packed = numbers.view(8, 3, num_heads, head_dim).requires_grad_()
            with torch.enable_grad(), torch.autocast(device.type, enabled=False):
                q, k, v = packed.unbind(1)
                out = attend(q, k, v, ragged)
                results.append((out, *torch.autograd.grad(out.square().sum(), packed)))
        agree = all(torch.allclose(a, b, rtol=0.05, atol=0.05) for a, b in zip(*results, strict=True))
    except ImportError as error:
        return f"it is not installed ({error})"
    except Exception as error:  # of a library that is not ours: whatever it is, another kernel is there
        return f"{type(error).__name__}: {error}".split("\n", 1)[0].split(". ", 1)[0]
    return None if agree else "its results are not those of padded attention"
