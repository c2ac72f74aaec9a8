"""Attention and blocks, dense and ragged, against other formulations of the same."""

import torch

from eclip.model.ragged import Ragged
from eclip.model.transformer import Attention, PostNormBlock


def bounds(*lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def test_attention_equals_torch_multihead_attention():
    torch.manual_seed(0)
    ours, theirs = Attention(16, 4), torch.nn.MultiheadAttention(16, 4, batch_first=True)
    ours.qkv.load_state_dict({"weight": theirs.in_proj_weight, "bias": theirs.in_proj_bias})
    ours.proj.load_state_dict(theirs.out_proj.state_dict())
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(ours(x), theirs(x, x, x, need_weights=False)[0])


def test_dense_and_ragged_blocks_agree():
    torch.manual_seed(0)
    block = PostNormBlock(16, 2, eps=1e-6)
    x = torch.randn(3, 5, 16)
    packed = block(x.flatten(0, 1), Ragged.from_cu_seqlens(bounds(5, 5, 5)))
    torch.testing.assert_close(packed.view(3, 5, 16), block(x))
    torch.testing.assert_close(block(x).mean(-1), torch.zeros(3, 5), rtol=0, atol=1e-5)  # the norm comes last
