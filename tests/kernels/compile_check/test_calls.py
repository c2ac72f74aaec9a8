"""Calls as text, the random ones, and that no kernel is left out."""

from types import SimpleNamespace

import pytest

from eclip.kernels.compile_check.calls import LISTED, describe, parse
from eclip.kernels.compile_check.coverage import kernels, uncompiled
from eclip.kernels.compile_check.slot_attention_calls import SlotAttentionCall
from eclip.kernels.compile_check.stub import Launch
from eclip.kernels.compile_check.sweep import draw


def test_a_call_is_repeated_from_its_description() -> None:
    for call in (*LISTED, *draw(200, seed=1)):
        assert parse(describe(call)) == call


def test_listed_calls_are_distinct() -> None:
    assert len(set(LISTED)) == len(LISTED)


def test_a_description_tells_what_differs() -> None:
    call = SlotAttentionCall(queries=33, dim=1000, dtype="float16", norm=True)
    assert describe(call) == "slot_attention queries=33 dim=1000 dtype=float16 norm"
    assert describe(SlotAttentionCall()) == "slot_attention"


@pytest.mark.parametrize("text", ["", "attention", "slot_attention queeries=3", "slot_attention queries=many"])
def test_what_is_no_call_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse(text)


def test_a_seed_draws_the_same_calls() -> None:
    assert draw(30, seed=7) == draw(30, seed=7)
    assert draw(30, seed=7) != draw(30, seed=8)
    assert draw(10, seed=7) == draw(30, seed=7)[:10]


def test_random_calls_are_valid() -> None:
    for call in draw(300, seed=0):
        if isinstance(call, SlotAttentionCall):
            assert call.heads % call.groups == 0
            assert not (call.separate and call.norm)
            assert call.queries <= 64 and call.dim <= 2048
        else:
            assert call.texts >= call.images
            assert call.texts == call.images or call.sides != "both" or call.positives != "all"
            assert not call.kept or (call.dtype == "bfloat16" and call.sides != "sigmoid")


def test_a_kernel_that_no_call_launches_is_named() -> None:
    """Of every folder an op has; the check stops with its name."""
    found = [
        Launch("some call", 90, SimpleNamespace(fn=SimpleNamespace(__name__=name)), "{}") for name in sorted(kernels())
    ]
    assert "slot_attention_bwd_kernel" in kernels() and "_contrastive_fwd_kernel" in kernels()
    assert uncompiled(found) == []
    assert uncompiled(found[1:]) == [found[0].name]
