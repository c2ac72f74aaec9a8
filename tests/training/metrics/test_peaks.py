"""Peaks of GPUs by their names."""

import pytest

from eclip.training.metrics.peaks import named_peak


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA L4", 121), ("NVIDIA L40", 181), ("NVIDIA L40S", 362), ("NVIDIA L20", 119.5),
        ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835), ("NVIDIA H800", 989),
        ("NVIDIA H200", 989), ("NVIDIA H200 NVL", 836), ("NVIDIA GH200 480GB", 989), ("NVIDIA H20", 148),
        ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A100 80GB PCIe", 312), ("A100-PCIE-40GB", 312), ("NVIDIA A10", 125),
        ("NVIDIA A800-SXM4-80GB", 312), ("NVIDIA B200", 2250), ("NVIDIA GB200", 2500), ("NVIDIA RTX A6000", 155),
        ("NVIDIA RTX 6000 Ada Generation", 364),
        ("NVIDIA A10G", None), ("NVIDIA L4000", None), ("Tesla V100-SXM2-16GB", None), ("NVIDIA A100X", None),
        ("NVIDIA GeForce RTX 4090", None), ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None), ("GRID A100-20C", None),
        ("AMD Instinct MI300X", None), ("", None),
    ],
)  # fmt: skip
def test_peaks_by_whole_words(name: str, teraflops: float | None) -> None:
    assert named_peak(name) == (None if teraflops is None else teraflops * 1e12)
