"""The decoder against equations 1-5 of the paper written out per image and query, and the claims made about it."""

import functools
import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from eclip.kernels.slot_attention import ops
from eclip.model.instance_decoder import InstanceBlock, InstanceDecoder, InstanceQueries
from tests.model.tiny import tiny

B, N, T, D = 2, 7, 5, 16


def inputs(dtype=torch.float64):
    torch.manual_seed(0)
    return torch.randn(B, N, D, dtype=dtype), torch.randn(B, T, D, dtype=dtype)


def layer_norm(x, norm):
    mean = x.mean(-1, keepdim=True)
    return (x - mean) / ((x - mean).square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias


def decode_by_the_paper(decoder, z, q, heads):
    """One image: z (N, D), q (T, D). Returns H^L (T, D), the mean entropy and the last A (N, T)."""
    z = layer_norm(z, decoder.token_norm)
    h = torch.zeros_like(q)
    entropies = []
    for block in decoder.blocks:
        m = (z @ block.w_key.weight.T) @ ((q + h) @ block.w_query.weight.T).T / math.sqrt(D)
        a = m.exp() / m.exp().sum(dim=1, keepdim=True)  # over the T queries
        entropies.append(-(a * a.log()).sum() / N)
        dh = torch.stack(
            [sum(a[i, t] * (block.w_value.weight @ z[i]) for i in range(N)) / (a[:, t].sum() + 1e-6) for t in range(T)]
        )
        h = layer_norm(h + dh @ block.w_out.weight.T, block.norm)
        tail = block.among_queries
        parts = []
        for head in range(heads):
            rows = slice(head * D // heads, (head + 1) * D // heads)
            hq, hk, hv = (
                h @ tail.attn.qkv.weight.view(3, D, D)[i][rows].T + tail.attn.qkv.bias.view(3, D)[i][rows]
                for i in range(3)
            )
            parts.append((hq @ hk.T / math.sqrt(D // heads)).softmax(-1) @ hv)
        h = layer_norm(h + torch.cat(parts, -1) @ tail.attn.proj.weight.T + tail.attn.proj.bias, tail.norm1)
        inner = h @ tail.mlp.fc1.weight.T + tail.mlp.fc1.bias
        inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
        h = layer_norm(h + inner @ tail.mlp.fc2.weight.T + tail.mlp.fc2.bias, tail.norm2)
    return h, sum(entropies) / len(entropies), a


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_equations_of_the_paper(kernels):
    decoder = InstanceDecoder(tiny(kernels=kernels)).double()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    tokens, queries = inputs()
    output = decoder(tokens, queries, return_map=True)
    expected = [decode_by_the_paper(decoder, z, q, heads=4) for z, q in zip(tokens, queries, strict=True)]
    torch.testing.assert_close(output.slots, torch.stack([e[0] for e in expected]), rtol=0, atol=1e-9)
    torch.testing.assert_close(output.entropy, torch.stack([e[1] for e in expected]).mean(), rtol=0, atol=1e-9)
    torch.testing.assert_close(output.assignment.double(), torch.stack([e[2].T for e in expected]), rtol=0, atol=1e-6)
    assert output.entropy.dtype == torch.float64
    assert output.assignment.dtype == torch.float32
    assert not output.assignment.requires_grad


def gradients(decoder, run=None):
    """Of tokens, queries and every parameter, for a loss on all that training reads."""
    z, q = (x.requires_grad_() for x in inputs(decoder.blocks[0].w_out.weight.dtype))
    output = (decoder if run is None else run)(z, q)
    loss = (output.slots.square() * torch.arange(D)).sum().add(output.entropy)
    return torch.autograd.grad(loss, [z, q, *decoder.parameters()])


@pytest.mark.parametrize("heads", [1, 2, 8])
def test_gradients_of_the_kernel_path_are_those_of_the_reference(heads):
    """Up to 4 heads the projections are absorbed and the blocks share one token gradient; with 8 neither."""
    auto, reference = (InstanceDecoder(tiny(kernels=k, slot_heads=heads)).double() for k in ("auto", "reference"))
    reference.load_state_dict(auto.state_dict())
    torch.testing.assert_close(gradients(auto), gradients(reference))


def test_the_token_gradient_is_written_once(monkeypatch):
    """However many blocks read the tokens: the others would each write one and add it up."""
    written = []
    once = ops.plain_token_gradients
    monkeypatch.setattr(ops, "plain_token_gradients", lambda *a: (written.append(len(a[0])), once(*a))[1])
    decoder = InstanceDecoder(tiny(decoder_depth=4)).double()
    gradients(decoder)
    assert written == [4]


@pytest.mark.parametrize("heads", [1, 8])
def test_blocks_may_be_recomputed(heads):
    """Activation checkpointing of every block: same gradients."""
    decoder = InstanceDecoder(tiny(slot_heads=heads)).double()
    expected = gradients(decoder)
    for block in decoder.blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    torch.testing.assert_close(gradients(decoder), expected)


@pytest.mark.parametrize("heads", [1, 8])
def test_compiles_without_graph_breaks(heads):
    decoder = InstanceDecoder(tiny(slot_heads=heads)).double()
    torch._dynamo.reset()
    compiled = torch.compile(decoder, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradients(decoder, compiled), gradients(decoder))


def test_slots_hold_image_content_alone():
    """With equal tokens every weighted mean is the same vector, whatever the prompts say."""
    decoder = InstanceDecoder(tiny(slot_eps=1e-12)).double()
    _, queries = inputs()
    token = torch.randn(D, dtype=torch.float64)
    slots = decoder(token.expand(B, N, D), queries).slots
    torch.testing.assert_close(slots, slots[:1, :1].expand(B, T, D), rtol=0, atol=1e-8)


def test_queries_are_exchangeable():
    decoder = InstanceDecoder(tiny()).double()
    tokens, queries = inputs()
    order = torch.tensor([3, 1, 4, 0, 2])
    first, second = (decoder(tokens, q, return_map=True) for q in (queries, queries[:, order]))
    torch.testing.assert_close(second.slots, first.slots[:, order])
    torch.testing.assert_close(second.assignment, first.assignment[:, order])


def test_the_split_starts_soft():
    """Random prompts, tokens of any scale: neither saturated, where softmax has no gradient, nor uniform."""
    torch.manual_seed(0)
    decoder = InstanceDecoder(tiny(embed_dim=64, num_queries=20))
    queries = InstanceQueries(tiny(embed_dim=64, num_queries=20))(
        torch.randn(4, 20, 64), torch.zeros(4, 20, dtype=torch.long)
    )
    for token_scale in (0.05, 1.0, 20.0):
        entropy = decoder(token_scale * torch.randn(4, 30, 64), queries).entropy
        assert 1.2 < entropy < 2.9, "neither hard (0) nor uniform (log 20 = 3.0)"


@pytest.mark.parametrize("heads", [1, 2])
def test_slot_heads_are_averaged_in_the_assignment(heads):
    tokens, queries = inputs(torch.float32)
    output = InstanceDecoder(tiny(slot_heads=heads))(tokens, queries, return_map=True)
    assert output.assignment.shape == (B, T, N)
    torch.testing.assert_close(output.assignment.sum(1), torch.ones(B, N))


def test_prompts_of_any_length_make_queries_of_one_length():
    queries = InstanceQueries(tiny())
    prompts, modality = torch.randn(2, T, D), torch.randint(2, (2, T))
    out = queries(prompts, modality)
    expected = F.normalize(prompts, dim=-1) * 4 + queries.position + queries.modality[modality]
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(queries(100 * prompts, modality), out)


def test_another_number_of_prompts_is_refused():
    with pytest.raises(ValueError, match=r"\(B, 5, 16\)"):
        InstanceQueries(tiny())(torch.randn(2, 4, D), torch.zeros(2, 4, dtype=torch.long))


def test_a_block_starts_as_the_identity_of_what_it_pools():
    """With queries that all score alike a slot is the mean token, through W_v and W_o unchanged."""
    torch.manual_seed(0)
    block = InstanceBlock(tiny(embed_dim=64))
    tokens = torch.randn(2, 9, 64)
    update = block.w_out(block.w_value(tokens.mean(dim=1)))
    torch.testing.assert_close(update, tokens.mean(dim=1))
    scores = block.w_query(tokens) @ block.w_key(tokens).mT
    torch.testing.assert_close(scores, tokens @ tokens.mT)
