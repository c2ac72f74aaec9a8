"""What of a compiled kernel is a fault."""

import dataclasses
from collections import Counter

from eclip.kernels.compile_check.report import KNOWN_SPILLS, Report, products
from eclip.kernels.compile_check.sass import Code

KERNEL = "slot_attention_bwd_kernel"
CALL = "slot_attention entropy"


def report(*, registers: int = 200, spilled: int = 0, shared: int = 0, product: str = "half", **code: int) -> Report:
    return Report(
        registers=registers,
        spilled=spilled,
        shared=shared,
        code=Code(loop=Counter(code), rest=Counter(), in_flight=0),
        products=frozenset({product} if product else ()),
        seconds=1.0,
    )


def test_faults() -> None:
    clean = report(shared=170000, HMMA=40)
    assert not clean.faults(CALL, KERNEL, 90)
    assert "exceeds sm_80's 166912" in clean.faults(CALL, KERNEL, 80)[0]
    assert "spills 16 bytes" in report(spilled=16, HMMA=40).faults(CALL, KERNEL, 90)[0]
    assert "spills" in report(HMMA=40, local=2).faults(CALL, KERNEL, 90)[0]
    assert "no tensor-core" in report(HMMA=0).faults(CALL, KERNEL, 90)[0]
    assert not report(product="").faults(CALL, KERNEL, 90)
    assert not report(product="full").faults(CALL, KERNEL, 90)
    assert "in TF32" in report(product="full", HMMA=40).faults(CALL, KERNEL, 90)[0]
    assert not report(product="tf32", HMMA=40).faults(CALL, KERNEL, 90)


def test_the_losses_need_the_newest_tensor_cores() -> None:
    old = report(HMMA=40)
    assert not old.faults("contrastive", "_contrastive_fwd_kernel", 80)
    for arch, missing in ((90, "no HGMMA"), (100, "no UTCHMMA")):
        assert old.faults("contrastive", "_contrastive_fwd_kernel", arch) == [missing]
        assert not old.faults("contrastive", "_contrastive_rescale_kernel", arch)


def test_a_known_spill_may_not_grow() -> None:
    (call, kernel, arch), most = next(iter(KNOWN_SPILLS.items()))
    known = report(spilled=most, HGMMA=40, local=3)
    assert not known.faults(call, kernel, arch)
    assert f"spills {most + 4} bytes" in dataclasses.replace(known, spilled=most + 4).faults(call, kernel, arch)[0]
    assert known.faults(call + " mask", kernel, arch)


def test_a_random_call_may_spill_and_nothing_else() -> None:
    spilling = report(spilled=16, HMMA=40)
    assert not spilling.faults(CALL, KERNEL, 90, random=True)
    assert "spills 16 bytes" in spilling.remarks()[0]
    assert "exceeds" in report(shared=10**6, HMMA=1).faults(CALL, KERNEL, 90, random=True)[0]
    assert dataclasses.replace(report(HMMA=1), serialised=True).remarks() == ["products wait for each other"]


def test_products_are_found_in_tritons_representation() -> None:
    half = "%7 = tt.dot %a, %b, %c, inputPrecision = tf32 : tensor<8x32x32xbf16> * tensor<8x32x32xbf16> -> tensor<f32>"
    full = "%7 = tt.dot %a, %b, %c : tensor<32x16xf32> * tensor<16x64xf32> -> tensor<32x64xf32>"
    thrice = (
        "%7 = tt.dot %a, %b, %c, inputPrecision = tf32x3 : tensor<64x16xf32> * tensor<16x64xf32> -> tensor<64x64xf32>"
    )
    assert products(half) == {"half"}
    assert products(full) == {"full"}
    assert products(thrice) == {"tf32"}
    assert products(f"{half}\n{full}") == {"half", "full"}
    assert not products("%7 = arith.addf %a, %b : tensor<32x16xf32>")
