"""Where a step's time goes: names to kinds, overlapping kernels, shares that add up."""

import math

import pytest
import torch

from benchmarks.train_step import kinds


@pytest.mark.parametrize(
    "name, kind",
    [
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT", "GEMM"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "GEMM"),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16>", "GEMM"),
        ("aten::addmm", "GEMM"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128>>", "attention"),
        ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80", "attention"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("_contrastive_fwd_kernel", "our kernels"),
        ("slot_attention_token_gradient_kernel", "our kernels"),
        ("eclip::pair_gradients", "our kernels"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor<float, 4>>", "optimizer"),
        ("aten::_fused_adamw_", "optimizer"),
        ("aten::_foreach_lerp_", "optimizer"),
        ("void at::native::vectorized_layer_norm_kernel<float, float>", "norm"),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
        ("void at::native::elementwise_kernel<128, 4, direct_copy_kernel_cuda>", "casts and layouts"),
        ("void at::native::vectorized_elementwise_kernel<4, bfloat16_copy_kernel_cuda>", "casts and layouts"),
        ("void at::native::vectorized_elementwise_kernel<4, GeluCUDAKernelImpl>", kinds.ELEMENTWISE),
        ("triton_poi_fused_add_0", kinds.ELEMENTWISE),
        ("void at::native::indexSelectLargeIndex<float>", "indexing"),
    ],
)
def test_a_name_is_of_a_kind(name: str, kind: str) -> None:
    assert kinds.kind_of(name) == kind


def test_kernels_that_overlap_count_once_and_gaps_are_idle() -> None:
    found = kinds.of_kernels(
        [
            ("gemm", 10.0, 50.0),
            ("Memcpy HtoD", 40.0, 70.0),  # 20 of its own
            ("flash_fwd", 45.0, 60.0),  # all of it beside others
            ("adam", 90.0, 110.0),  # after a gap of 20
            ("Optimizer.step#AdamW.step", 0.0, 200.0),  # a range, no kernel
        ]
    )
    assert found["GEMM"] == pytest.approx(0.4)
    assert found["copies"] == pytest.approx(0.2)
    assert found["attention"] == 0
    assert found["optimizer"] == pytest.approx(0.2)
    assert found[kinds.REST] == pytest.approx(0.2)
    assert math.isclose(sum(found.values()), 1)
    assert list(found) == list(kinds.NAMES)


def test_no_kernel_at_all_is_idle() -> None:
    assert kinds.of_kernels([])[kinds.REST] == 1


def test_shares_of_a_call_on_the_cpu() -> None:
    a = torch.randn(300, 300)
    found = kinds.shares(lambda: a @ a, torch.device("cpu"), steps=20)
    assert math.isclose(sum(found.values()), 1)
    assert found["GEMM"] == max(share for kind, share in found.items() if kind != kinds.REST)
