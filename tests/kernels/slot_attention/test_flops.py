"""FLOPs as torch's counter sees them: by hand, and as of the reference."""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from eclip.kernels.slot_attention import (
    share_tokens,
    slot_attention,
    slot_attention_absorbed,
    slot_attention_reference,
)
from tests.kernels.slot_attention.checks import absorbed_inputs, kv_inputs

B, T, N, D = 2, 3, 7, 16


def count(function, *inputs: Tensor, **options) -> tuple[int, int]:
    """Of the forward and of the backward pass."""
    with FlopCounterMode(display=False) as forward:
        out = function(*inputs, **options)
    with FlopCounterMode(display=False) as backward:
        (out[0] if isinstance(out, tuple) else out).sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize("num_heads", [1, 4])
@pytest.mark.parametrize("frozen", [(), (1,), (2,), (1, 2)])
def test_as_the_reference(path: torch.device, num_heads: int, frozen: tuple[int, ...]) -> None:
    """A product is 2 B T N D: two forward; two backward for the queries, one each for keys and values."""
    found = []
    for function in (slot_attention, slot_attention_reference):
        inputs = [x.to(path, torch.float32) for x in kv_inputs(B, T, N, D)]
        leaves = [x.requires_grad_(i not in frozen) for i, x in enumerate(inputs)]
        found.append(count(function, *leaves, num_heads=num_heads, return_entropy=True))
    product = 2 * B * T * N * D
    assert found[0] == found[1] == (2 * product, (4 - len(frozen)) * product)


def test_absorbed_counts_its_own_products() -> None:
    """Queries and outputs are projected, and not the N tokens; a folded LayerNorm adds no product of matrices."""
    heads, channels = 2, 12
    q, x, w_key, w_value, gamma, beta = (t.float().requires_grad_() for t in absorbed_inputs(B, T, N, D, channels))
    core, projection = 2 * B * heads * T * N * channels, 2 * B * T * D * channels
    plain = count(slot_attention_absorbed, q, x, w_key, w_value, num_heads=heads)
    assert plain == (2 * core + 2 * projection, 4 * core + 4 * projection)
    normed = count(slot_attention_absorbed, q, x, w_key, w_value, num_heads=heads, token_norm=(gamma, beta, 1e-5))
    assert normed == plain


def test_shared_tokens_cost_what_the_calls_cost_alone() -> None:
    q, x, w_key, w_value, *_ = (t.float().requires_grad_() for t in absorbed_inputs(B, T, N, D, D))

    def blocks(q: Tensor, x: Tensor, w_key: Tensor, w_value: Tensor) -> Tensor:
        tokens, ports = share_tokens(x, 3, num_queries=T)
        return sum(slot_attention_absorbed(q, tokens, w_key, w_value, port=port) for port in ports)

    alone = count(slot_attention_absorbed, q, x, w_key, w_value)
    assert count(blocks, q, x, w_key, w_value) == (3 * alone[0], 3 * alone[1])
