"""What training keeps of slot attention between forward and backward, against the layer written the usual way.

Paper sizes at one image: every number is proportional to the images. Bytes do not depend on the device.
"""

import pytest
import torch
from torch import Tensor

from benchmarks.harness.activations import kept_for_backward
from benchmarks.slot_attention.baselines import eager_decoder
from benchmarks.slot_attention.bench_slot_attention import six_blocks
from eclip.model.instance_decoder import InstanceDecoder
from eclip.model.settings import ModelConfig

N, T, D, BLOCKS = 196, 20, 768, 6
SHARE = 0.15


def saved_by_six_blocks(provider: str, device: torch.device) -> int:
    """Bytes kept besides the tokens and the weights. Each block makes its own queries, so these count."""

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16).requires_grad_()

    torch.manual_seed(0)
    tokens = leaf(1, N, D)
    queries = [leaf(1, T, D) for _ in range(BLOCKS)]
    weights = [leaf(D, D) for _ in range(2 * BLOCKS)]
    return kept_for_backward(lambda: six_blocks(provider, tokens, *queries, *weights), [tokens, *weights])


def saved_by_decoder(kernel: bool, device: torch.device) -> int:
    decoder = InstanceDecoder(ModelConfig(embed_dim=D, num_queries=T, decoder_depth=BLOCKS, decoder_heads=12))
    decoder = decoder.to(device, torch.bfloat16)
    tokens, queries = (torch.randn(1, rows, D, device=device, dtype=torch.bfloat16) for rows in (N, T))
    given = [tokens.requires_grad_(), queries.requires_grad_(), *decoder.parameters()]

    def decode() -> tuple[Tensor, Tensor]:
        if not kernel:
            return eager_decoder(decoder, tokens, queries)
        output = decoder(tokens, queries)
        return output.slots, output.entropy

    return kept_for_backward(decode, given)


@pytest.mark.parametrize("provider", ["ours", "ours, each"])
def test_six_blocks_keep_their_queries_and_nothing_of_the_tokens_size(provider: str, device: torch.device) -> None:
    """Three rows of D a query: q, the same in token space, the mean of the tokens. Eager keeps keys and values."""
    saved, of_eager = saved_by_six_blocks(provider, device), saved_by_six_blocks("eager", device)
    keys_and_values = BLOCKS * 2 * N * D * 2
    assert of_eager >= keys_and_values
    assert saved <= SHARE * of_eager
    assert saved <= 1.02 * BLOCKS * 3 * T * D * 2


def test_decoder_keeps_as_much_less_as_its_slot_attention(device: torch.device) -> None:
    """FFN and self-attention among the queries keep the same on both sides, so the difference is slot attention's."""
    spared = saved_by_decoder(False, device) - saved_by_decoder(True, device)
    blocks_spare = saved_by_six_blocks("eager", device) - saved_by_six_blocks("ours", device)
    assert spared == pytest.approx(blocks_spare, rel=0.02)
