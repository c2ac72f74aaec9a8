"""What CLIP's and SigLIP's towers promise beyond their weights: causality, pooling, padding, kept patches, and that
whatever is done to a model from outside is done to them too."""

import copy

import pytest
import torch
from torch.nn import functional as F

from eclip.model.eclip import ECLIP
from eclip.model.image_encoder import ImageEncoder
from eclip.model.ragged import Ragged, attend_ragged, causal_options
from eclip.model.residual import set_residual_dtype
from eclip.model.text_encoder import TextEncoder, set_text_attention
from eclip.model.transformer import ACTIVATIONS
from eclip.parallel.recompute import checkpoint_activations
from tests.model.tiny import tiny

CLIP = dict(
    vision_architecture="clip", vision_activation="quick_gelu", vision_eps=1e-5, pixel_statistics="clip",
    text_architecture="clip", text_activation="quick_gelu", text_pooling="last",
)  # fmt: skip
SIGLIP = dict(
    vision_architecture="siglip", vision_activation="gelu_tanh", pixel_statistics="half",
    text_architecture="siglip", text_activation="gelu_tanh", text_pooling="last",
)  # fmt: skip
KINDS = {"clip": CLIP, "siglip": SIGLIP}
BOUNDS = torch.tensor([0, 3, 4, 12], dtype=torch.int32)


def random(encoder):
    """Far from the start, where blocks hardly mix tokens."""
    torch.manual_seed(0)
    for parameter in encoder.parameters():
        parameter.data.add_(torch.randn(parameter.shape), alpha=0.2)
    return encoder.double()


def texts():
    return torch.randint(50, (12,), generator=torch.Generator().manual_seed(1))


def hidden(encoder, tokens):
    causal = encoder.config.text_architecture == "clip"
    return encoder.hidden(tokens, Ragged.from_cu_seqlens(BOUNDS, causal=causal))


@pytest.mark.parametrize("place", [4, 7, 11])
@torch.no_grad()
def test_no_token_of_a_clip_sees_a_later_one(place):
    encoder, tokens = random(TextEncoder(tiny(**CLIP))), texts()
    changed = tokens.clone()
    changed[place] = (changed[place] + 1) % 50
    before, after = hidden(encoder, tokens), hidden(encoder, changed)
    moved = ((before - after).abs().amax(1) > 1e-9).nonzero().flatten().tolist()
    assert moved == list(range(place, 12))  # of the last text, and of no other


@torch.no_grad()
def test_every_token_of_a_siglip_sees_all_of_its_text():
    encoder, tokens = random(TextEncoder(tiny(**SIGLIP))), texts()
    changed = tokens.clone()
    changed[11] = (changed[11] + 1) % 50
    moved = ((hidden(encoder, tokens) - hidden(encoder, changed)).abs().amax(1) > 1e-9).tolist()
    assert moved == [False] * 4 + [True] * 8


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_last_token_is_pooled_and_neighbours_do_not_matter(kind):
    encoder, tokens = random(TextEncoder(tiny(**KINDS[kind]))), texts()
    together = encoder(tokens, BOUNDS)
    last = encoder.final_norm(hidden(encoder, tokens)[[2, 3, 11]])
    torch.testing.assert_close(together, last if encoder.head is None else encoder.head(last))
    alone = [encoder(tokens[a:b], torch.tensor([0, b - a], dtype=torch.int32)) for a, b in ((0, 3), (3, 4), (4, 12))]
    torch.testing.assert_close(together, torch.cat(alone))


@torch.no_grad()
def test_padding_counts_for_siglip_alone():
    """CLIP's end of text is pooled before its padding; SigLIP was trained on its own."""
    tokens, ends = texts()[:5], (5, 8)
    padded = torch.cat([tokens, torch.zeros(3, dtype=torch.int64)])
    for kind, same in (("clip", True), ("siglip", False)):
        encoder = random(TextEncoder(tiny(**KINDS[kind])))
        hiddens = [
            encoder.hidden(row, Ragged.from_cu_seqlens(torch.tensor([0, end]), causal=kind == "clip"))[4]
            for row, end in zip((tokens, padded), ends, strict=True)
        ]
        assert torch.allclose(*hiddens) == same, kind


def test_causal_attention_of_ragged_text():
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(12, 3, 8, generator=generator, dtype=torch.float64).requires_grad_() for _ in "qkv")
    mask = torch.block_diag(*(torch.ones(n, n).tril() for n in BOUNDS.diff().tolist())).bool()
    expected = F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in (q, k, v)), attn_mask=mask).transpose(0, 1)
    wanted = torch.autograd.grad(expected.square().sum(), (q, k, v))
    for longest in (None, 20):
        out = attend_ragged(q, k, v, Ragged.from_cu_seqlens(BOUNDS, longest=longest, causal=True))
        torch.testing.assert_close(out, expected)
        for mine, theirs in zip(torch.autograd.grad(out.square().sum(), (q, k, v)), wanted, strict=True):
            torch.testing.assert_close(mine, theirs)


def test_varlen_is_told_to_be_causal_in_its_version():
    from torch.nn.attention.varlen import varlen_attn

    assert causal_options(varlen_attn) in ({"is_causal": True}, {"window_size": (-1, 0)})
    assert causal_options(lambda q, *, is_causal=False: q) == {"is_causal": True}
    assert causal_options(lambda q, *, window_size=(-1, -1): q) == {"window_size": (-1, 0)}


def test_activations_are_what_their_names_say():
    x = torch.linspace(-6, 6, 101, dtype=torch.float64)
    torch.testing.assert_close(ACTIVATIONS["quick_gelu"](x), x * torch.sigmoid(1.702 * x))
    torch.testing.assert_close(ACTIVATIONS["gelu_tanh"](x), F.gelu(x, approximate="tanh"))
    assert ACTIVATIONS["gelu"] is F.gelu


@torch.no_grad()
def test_attention_pooling_is_torchs():
    encoder = random(ImageEncoder(tiny(**SIGLIP)))
    pool, tokens = encoder.attn_pool, torch.randn(2, 16, 32, dtype=torch.float64)
    theirs = torch.nn.MultiheadAttention(32, 4, batch_first=True).double()
    for ours, name in ((torch.cat([pool.q.weight, pool.kv.weight]), "in_proj_weight"),
                       (torch.cat([pool.q.bias, pool.kv.bias]), "in_proj_bias")):  # fmt: skip
        getattr(theirs, name).copy_(ours)
    theirs.out_proj.load_state_dict(pool.proj.state_dict())
    x = theirs(pool.latent.expand(2, -1, -1), tokens, tokens)[0]
    torch.testing.assert_close(pool(tokens), (x + pool.mlp(pool.norm(x)))[:, 0])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_kept_patches_alone_are_seen(kind):
    encoder = random(ImageEncoder(tiny(**KINDS[kind])))
    images, kept = torch.randn(2, 3, 32, 32, dtype=torch.float64), torch.tensor([1, 6, 7, 15])
    assert torch.equal(encoder(images, torch.arange(16)), encoder(images))
    out = encoder(images, kept)
    assert out.shape == (2, 5, 32)
    for patch in (i for i in range(16) if i not in kept):
        row, column = 8 * (patch // 4), 8 * (patch % 4)
        images[:, :, row : row + 8, column : column + 8] = torch.nan
    torch.testing.assert_close(encoder(images, kept), out)


def everything(model, dtype=None):
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        image, words = model.encode_image(images), model.encode_text(texts(), BOUNDS, longest=8)
    return torch.cat([image.cls, image.tokens.flatten(0, 1), words]).float()


@pytest.mark.parametrize("mode", ["blocks", "selective"])
@pytest.mark.parametrize("kind", KINDS)
def test_recomputed_blocks_give_the_same_gradients(kind, mode):
    torch.manual_seed(0)
    plain = ECLIP(tiny(**KINDS[kind]))
    ours = copy.deepcopy(plain)
    assert checkpoint_activations(ours, mode)
    for model in (plain, ours):
        everything(model).square().sum().backward()
    for (name, a), b in zip(plain.named_parameters(), ours.parameters(), strict=True):
        if a.grad is not None:
            torch.testing.assert_close(b.grad, a.grad, msg=name)
    trained = {name for name, p in ours.named_parameters() if "encoder" in name and p.grad is None}
    assert trained == set(), "a parameter of a tower has no gradient"


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_residual_stream_in_bfloat16(kind):
    torch.manual_seed(0)
    model = ECLIP(tiny(**KINDS[kind]))
    exact = everything(model)
    set_residual_dtype(model, torch.bfloat16)
    seen = []
    for tower in (model.image_encoder, model.text_encoder):
        tower.blocks[1].register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    torch.testing.assert_close(everything(model), exact)  # without autocast nothing changes
    seen.clear()
    torch.testing.assert_close(everything(model, torch.bfloat16), exact, rtol=0.05, atol=0.1)
    assert seen == [torch.bfloat16] * 2


@pytest.mark.parametrize("kind", KINDS)
def test_the_text_kernel_is_chosen_for_the_kind_of_attention(kind, monkeypatch):
    asked = []
    monkeypatch.setattr("eclip.model.ragged.fails", lambda *_, causal: asked.append(causal))
    assert set_text_attention(ECLIP(tiny(**KINDS[kind])), "auto", torch.device("cuda"), torch.bfloat16) == "varlen"
    assert asked == [kind == "clip"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"text_architecture": "clip"}, "text_pooling=cls with text_architecture=clip: .*--text-pooling to last"),
        ({"text_pooling": "last"}, "text_pooling=last with text_architecture=bert: .*--text-pooling to cls or mean"),
        ({"text_architecture": "t5"}, "text_architecture='t5': use one of bert, clip, siglip"),
        ({"vision_activation": "relu"}, "use one of gelu, quick_gelu, gelu_tanh for --vision-activation"),
    ],
)
def test_settings_that_contradict(changes, words):
    with pytest.raises(ValueError, match=words):
        tiny(**changes)
