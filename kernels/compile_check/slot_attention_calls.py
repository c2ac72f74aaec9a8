"""Calls of slot attention's launchers whose kernels are compiled: the decoder's, and corners of what is allowed."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..slot_attention.backward import triton_backward, triton_token_gradients
from ..slot_attention.forward import triton_forward


@dataclass(frozen=True, kw_only=True)
class SlotAttentionCall:
    """Forward, backward and the tokens' gradient, as the op and its autograd call them."""

    queries: int = 20
    tokens: int = 196
    dim: int = 768
    """Channels of a head."""
    dtype: str = "bfloat16"
    batch: int = 1000
    """Few images make the launchers split the tokens of one."""
    heads: int = 1
    groups: int = 1
    """Of heads that share their tokens; divides `heads`."""
    separate: bool = False
    """Values beside the keys; else the tokens are both."""
    norm: bool = False
    """LayerNorm of the tokens, which may not be `separate` then."""
    normalize: str = "den"
    bias: bool = False
    mask: bool = False
    map: bool = False
    """The map is returned, and has a gradient."""
    entropy: bool = False
    mass: bool = False
    """The mass has a gradient."""
    calls: int = 1
    """Calls that share the tokens, and their gradient."""

    def run(self) -> None:
        """Call the launchers, with tensors on the default device."""
        batch, heads, groups, t, n, d = self.batch, self.heads, self.groups, self.queries, self.tokens, self.dim

        dtype = getattr(torch, self.dtype)

        def floats(*shape: int, wanted: bool) -> Tensor | None:
            return torch.empty(shape, dtype=torch.float32) if wanted else None

        q, k = torch.empty(batch, heads, t, d, dtype=dtype), torch.empty(batch, groups, n, d, dtype=dtype)
        v = torch.empty_like(k) if self.separate else None
        bias = floats(batch, heads, t, wanted=self.bias)
        mask = torch.empty(batch, t, dtype=torch.bool) if self.mask else None
        scale, eps, norm_eps = 0.1, 1e-6, 1e-5 if self.norm else None
        out, mass, *_ = triton_forward(
            q, k, v, bias, mask, scale, self.normalize, eps, norm_eps, self.map, self.entropy
        )  # fmt: skip
        grad_out = torch.empty_like(out)
        grad_mass = floats(batch, heads, t, wanted=self.mass)
        grad_map = floats(batch, heads, t, n, wanted=self.map)
        grad_entropy = floats(batch, heads, wanted=self.entropy)
        *_, coefficients, affine = triton_backward(
            grad_out, grad_mass, grad_map, grad_entropy, q, k, v, bias, mask, mass, out,
            scale, self.normalize, eps, norm_eps, True,
        )  # fmt: skip
        all_coefficients, queries, grad_outs = ([x] * self.calls for x in (coefficients, q, grad_out))
        affines = [affine] * self.calls if self.norm else []
        for which in ("queries", "grad_outs") if self.separate else ("both",):
            triton_token_gradients(all_coefficients, queries, grad_outs, affines, k, which)


def _all_options(**sizes: int | str | bool) -> SlotAttentionCall:
    """With everything that costs registers: bias, mask, map, entropy and the normaliser that needs most."""
    everything = {"normalize": "mean"} | dict.fromkeys(("bias", "mask", "map", "entropy", "mass"), True)
    return SlotAttentionCall(**(everything | sizes))  # type: ignore[arg-type]


SLOT_ATTENTION_CALLS = (
    # The decoder: alone, of its twelve or six blocks, with heads, with values of their own; the demo.
    SlotAttentionCall(entropy=True),
    SlotAttentionCall(entropy=True, calls=12),
    SlotAttentionCall(batch=4096, entropy=True, calls=6),
    SlotAttentionCall(),
    SlotAttentionCall(batch=200, heads=12, groups=12, dim=64, separate=True, entropy=True),
    SlotAttentionCall(batch=200, heads=12, groups=4, dim=64, separate=True, calls=2),
    SlotAttentionCall(separate=True, entropy=True),
    SlotAttentionCall(batch=8, queries=8, tokens=144, dim=384, entropy=True, calls=2),
    # Its options, one after the other and together.
    SlotAttentionCall(norm=True, entropy=True),
    SlotAttentionCall(norm=True, entropy=True, calls=12),
    SlotAttentionCall(bias=True, entropy=True, mass=True),
    SlotAttentionCall(bias=True, entropy=True, mass=True, norm=True),
    SlotAttentionCall(normalize="l1max", entropy=True),
    SlotAttentionCall(normalize="sum", entropy=True),
    _all_options(),
    _all_options(norm=True),
    _all_options(separate=True),
    _all_options(heads=12, groups=12, dim=64, batch=200, separate=True),
    # Few images: their tokens are split.
    SlotAttentionCall(batch=4, entropy=True),
    _all_options(batch=4, queries=7, dim=384, norm=True, dtype="float16"),
    _all_options(batch=4, queries=15, tokens=256, dim=1408),
    SlotAttentionCall(batch=4, tokens=576, bias=True, entropy=True, mass=True, norm=True),
    # More tokens than a block holds.
    SlotAttentionCall(tokens=576),
    SlotAttentionCall(tokens=576, bias=True, entropy=True, mass=True, norm=True),
    SlotAttentionCall(tokens=729, dim=1152, bias=True, entropy=True, mass=True, norm=True),
    SlotAttentionCall(tokens=729, dim=1408, norm=True, entropy=True, calls=6),
    # Other sizes: the least and the most of what is allowed.
    _all_options(queries=1, dim=16, norm=True, calls=2),
    _all_options(queries=64, tokens=576, dim=1024, norm=True, calls=6),
    _all_options(queries=31, dim=1024),
    _all_options(tokens=49, dim=384, separate=True, dtype="float16"),
    SlotAttentionCall(dim=1152, entropy=True),
    _all_options(dim=1152),
    SlotAttentionCall(queries=15, dim=1408, entropy=True),
    SlotAttentionCall(tokens=256, dim=1408, entropy=True),
    _all_options(tokens=256, dim=2048, separate=True),
    # Full precision.
    _all_options(norm=True, dtype="float32", calls=6),
    _all_options(queries=64, dim=1024, norm=True, dtype="float32"),
    _all_options(dim=1408, norm=True, dtype="float32"),
)
