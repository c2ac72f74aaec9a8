"""Ragged attention and blocks against the same computation, one sequence at a time."""

import pytest
import torch

from eclip.model.ragged import Ragged, attend_ragged
from eclip.model.transformer import Attention, PostNormBlock


def bounds(*lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def test_ragged_layout():
    ragged = Ragged.from_cu_seqlens(bounds(2, 4, 1))
    assert ragged.rows.tolist() == [0, 1, 4, 5, 6, 7, 8]
    assert ragged.positions.tolist() == [0, 1, 0, 1, 2, 3, 0]
    assert ragged.sequence.tolist() == [0, 0, 1, 1, 1, 1, 2]
    assert ragged.present.tolist() == [[True, True, False, False], [True] * 4, [True, False, False, False]]
    told = Ragged.from_cu_seqlens(bounds(2, 4, 1), total=7, longest=6)  # at least the longest
    assert told.rows.tolist() == [0, 1, 6, 7, 8, 9, 12]
    assert told.present.sum(1).tolist() == [2, 4, 1] and told.present.shape == (3, 6)


@pytest.mark.parametrize("lengths", [(3, 0, 2), ()])
def test_empty_texts_are_refused(lengths):
    with pytest.raises(ValueError, match="empty text"):
        Ragged.from_cu_seqlens(bounds(*lengths))


def test_ragged_attention_equals_sequence_by_sequence():
    torch.manual_seed(0)
    lengths = (3, 1, 7, 4)
    cu = bounds(*lengths)
    q, k, v = (torch.randn(sum(lengths), 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    out = attend_ragged(q, k, v, Ragged.from_cu_seqlens(cu))
    expected = []
    for first, last in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
        scores = torch.einsum("qhd,khd->hqk", q[first:last], k[first:last]) / 8**0.5
        expected.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[first:last]))
    torch.testing.assert_close(out, torch.cat(expected))
    weight = torch.randn_like(out)
    grads = torch.autograd.grad((out * weight).sum(), (q, k, v), retain_graph=True)
    wanted = torch.autograd.grad((torch.cat(expected) * weight).sum(), (q, k, v))
    torch.testing.assert_close(grads, wanted)


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
