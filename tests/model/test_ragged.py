"""Ragged attention, whatever computes it, against attention of the whole packed batch under a block-diagonal mask."""

import copy

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from eclip.model import ragged as module
from eclip.model.eclip import ECLIP
from eclip.model.ragged import Kernel, Ragged, attend_ragged, choose_kernel
from eclip.model.text_encoder import set_text_attention
from tests.helpers import assert_as_accurate
from tests.model.tiny import tiny

LENGTHS = (3, 1, 17, 4, 9)
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def bounds(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def heads(dtype: torch.dtype, device: torch.device = CPU, head_dim: int = 16) -> tuple[Tensor, ...]:
    """Queries, keys and values as `Attention` makes them: slices of one product's output."""
    torch.manual_seed(0)
    packed = torch.randn(sum(LENGTHS), 3, 4, head_dim).to(device, dtype)
    return tuple(x.requires_grad_() for x in packed.unbind(1))


def under_a_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Every row attends to every row, under the mask (total, total) of the sequences."""
    if mask is None:
        mask = torch.block_diag(*(torch.ones(n, n) for n in LENGTHS)).bool().to(q.device)
    parts = (x.transpose(0, 1) for x in (q, k, v))
    return F.scaled_dot_product_attention(*parts, attn_mask=mask).transpose(0, 1)


def exact(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return outcome(under_a_mask, tuple(x.detach().double().requires_grad_() for x in inputs))


def outcome(attend, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    out = attend(*inputs)
    weight = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out).to(out.dtype)
    return out, *torch.autograd.grad((out * weight).sum(), inputs)


def ragged(device: torch.device = CPU, kernel: Kernel | None = None) -> Ragged:
    return Ragged.from_cu_seqlens(bounds(*LENGTHS).to(device), total=sum(LENGTHS), longest=max(LENGTHS), kernel=kernel)


def test_layout() -> None:
    found = Ragged.from_cu_seqlens(bounds(2, 4, 1))
    assert found.rows.tolist() == [0, 1, 4, 5, 6, 7, 8]
    assert found.positions.tolist() == [0, 1, 0, 1, 2, 3, 0]
    assert found.sequence.tolist() == [0, 0, 1, 1, 1, 1, 2]
    assert found.present.tolist() == [[True, True, False, False], [True] * 4, [True, False, False, False]]
    assert (found.longest, found.bounds.tolist()) == (4, [0, 2, 6, 7])
    told = Ragged.from_cu_seqlens(bounds(2, 4, 1), total=7, longest=6)  # at least the longest
    assert told.rows.tolist() == [0, 1, 6, 7, 8, 9, 12]
    assert told.present.sum(1).tolist() == [2, 4, 1] and told.present.shape == (3, 6)


@pytest.mark.parametrize("lengths", [(3, 0, 2), ()])
def test_empty_texts_are_refused(lengths: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="empty text"):
        Ragged.from_cu_seqlens(bounds(*lengths))


@pytest.mark.parametrize("longest", [None, max(LENGTHS), 30])
def test_padded_attention_is_exact(longest: int | None) -> None:
    inputs = heads(torch.float64)
    layout = Ragged.from_cu_seqlens(bounds(*LENGTHS), longest=longest)
    torch.testing.assert_close(outcome(lambda *x: attend_ragged(*x, layout), inputs), exact(inputs))


def test_padded_attention_in_bfloat16() -> None:
    """1e-3, where values are near a tenth: at one bfloat16 itself resolves 4e-3."""
    q, k, v = (x.detach() * scale for x, scale in zip(heads(torch.bfloat16), (1, 1, 0.125), strict=True))
    expected = under_a_mask(q.double(), k.double(), v.double())
    torch.testing.assert_close(attend_ragged(q, k, v, ragged()).double(), expected, rtol=0, atol=1e-3)
    inputs = heads(torch.bfloat16)
    found = outcome(lambda *x: attend_ragged(*x, ragged()), inputs)
    for mine, plain, best in zip(found, outcome(under_a_mask, inputs), exact(inputs), strict=True):
        assert_as_accurate(mine, plain, best)


def test_other_inputs_than_the_kernels_are_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation in float32 after training in bfloat16, a model moved to the CPU."""
    monkeypatch.setitem(module.KERNELS, "varlen", lambda q, k, v, ragged: torch.full_like(q, 7))
    layout = ragged(kernel=Kernel("varlen", "cpu", torch.bfloat16))
    assert (attend_ragged(*heads(torch.bfloat16), layout) == 7).all()
    inputs = heads(torch.float32)
    torch.testing.assert_close(attend_ragged(*inputs, layout), under_a_mask(*inputs))
    layout = ragged(kernel=Kernel("varlen", "cuda", torch.bfloat16))
    assert not (attend_ragged(*heads(torch.bfloat16), layout) == 7).any()


def test_the_first_that_works_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    model, options = ECLIP(tiny()), (CUDA, torch.bfloat16)
    faults = {"varlen": "too old", "xformers": None}
    monkeypatch.setattr(module, "fails", lambda name, *_, **__: faults[name])
    assert set_text_attention(model, "auto", *options) == "xformers"
    assert model.text_encoder.kernel == Kernel("xformers", "cuda", torch.bfloat16)
    with pytest.raises(ValueError, match=r"--text-attention varlen .*3 heads of 8 in bfloat16: too old; use auto"):
        set_text_attention(model, "varlen", *options)
    faults["varlen"] = None
    assert set_text_attention(model, "auto", *options) == "varlen"
    faults.update(varlen="no", xformers="no")
    assert set_text_attention(model, "auto", *options) == "padded"
    assert set_text_attention(model, "padded", *options) == "padded"


def test_without_a_gpu_texts_are_padded() -> None:
    assert choose_kernel("auto", CPU, torch.float32, num_heads=2, head_dim=8).name == "padded"
    for name in ("varlen", "xformers"):
        with pytest.raises(ValueError, match=f"--text-attention {name} does not work on cpu .*needs a CUDA GPU"):
            choose_kernel(name, CPU, torch.float32, num_heads=2, head_dim=8)


def test_a_kernel_is_tried_with_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*inputs: object) -> Tensor:
        raise ImportError("No module named 'x'")

    def failing(*inputs: object) -> Tensor:
        raise NotImplementedError("no kernel image. Visit us for resolutions.\nmore")

    cases = {
        "missing": (missing, "not installed (No module named 'x')"),
        "failing": (failing, "NotImplementedError: no kernel image"),
        "wrong": (lambda q, k, v, ragged: v, "results"),
        "wrong gradient": (lambda q, k, v, r: module.attend_padded(q.detach(), k, v, r), "results"),
    }
    for name, (kernel, told) in cases.items():
        monkeypatch.setitem(module.KERNELS, name, kernel)
        assert told in (module.fails(name, CPU, torch.float32, 2, 8) or ""), name
    state = torch.get_rng_state()
    assert module.fails("padded", CPU, torch.bfloat16, 2, 8) is None
    assert torch.equal(state, torch.get_rng_state()), "a run's random numbers do not depend on what is installed"


def test_the_choice_changes_no_parameter_and_is_copied() -> None:
    model = ECLIP(tiny())
    names = list(model.state_dict())
    set_text_attention(model, "padded", CPU, torch.float32)
    assert list(model.state_dict()) == names
    assert copy.deepcopy(model).text_encoder.kernel == Kernel("padded", "cpu", torch.float32)


def test_xformers_mask_is_block_diagonal() -> None:
    """Its mask, materialised, against ours, and what its kernels read of a mask made without the host's lengths."""
    pytest.importorskip("xformers")
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    theirs = BlockDiagonalMask.from_seqlens(list(LENGTHS), device=CPU)
    inputs = tuple(x.detach() * scale for x, scale in zip(heads(torch.bfloat16), (1, 1, 0.125), strict=True))
    mask = theirs.materialize((sum(LENGTHS), sum(LENGTHS)), torch.float64)
    expected = under_a_mask(*(x.double() for x in inputs), mask)
    torch.testing.assert_close(attend_ragged(*inputs, ragged()).double(), expected, rtol=0, atol=1e-3)
    ours = module.block_diagonal_mask(ragged())
    for info in ("q_seqinfo", "k_seqinfo"):
        assert torch.equal(getattr(ours, info).seqstart, getattr(theirs, info).seqstart)
        assert getattr(ours, info).max_seqlen == getattr(theirs, info).max_seqlen


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [16, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["varlen", "xformers"])
def test_kernels_of_gpus(name: str, dtype: torch.dtype, head_dim: int) -> None:
    why_not = module.fails(name, CUDA, dtype, 4, head_dim)
    if why_not is not None:
        pytest.skip(why_not)
    inputs = heads(dtype, CUDA, head_dim)
    layout = ragged(CUDA, Kernel(name, "cuda", dtype))
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = outcome(lambda *x: attend_ragged(*x, layout), inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    low, wanted = outcome(under_a_mask, inputs), exact(inputs)
    for which, mine, plain, best in zip("oqkv", out, low, wanted, strict=True):
        assert_as_accurate(mine, plain, best, name=which)


@pytest.mark.gpu
def test_bfloat16_on_a_gpu_is_not_padded() -> None:
    assert choose_kernel("auto", CUDA, torch.bfloat16, num_heads=12, head_dim=64).name in ("varlen", "xformers")
