"""Rows of a run of the contrastive loss that reaches some goals and misses others."""

import math
from typing import Any

from benchmarks.contrastive import goals
from benchmarks.contrastive.goals import BOTH, HUGE, LARGE, SHAPE, SHARP


def row(provider: str, seconds: float, shape: str = SHAPE, op: str = BOTH, **columns: Any) -> dict[str, Any]:
    return {"op": op, "provider": provider, "shape": shape, "dtype": "bfloat16", "seconds": seconds, **columns}


def a_run() -> list[dict[str, Any]]:
    return [
        row("ours", 8e-3, share=0.7, rms_error=2e-3, peak_bytes=2 * 10**9),
        row("eager", 24e-3, rms_error=3e-2),
        row("open_clip", 15e-3, rms_error=4e-2),
        row("memeff", 16e-3, rms_error=2.5e-3),
        row("reference", 1e-3, rms_error=1e-5),  # float32 inside: no peer
        row("ours", 0.14, LARGE, peak_bytes=29 * 10**8),
        row("ours", 7.0, HUGE, peak_bytes=21 * 10**9),
        row("ours", 8e-3, SHARP, rms_error=3e-3),
        row("memeff", 8e-3, SHARP, rms_error=2e-3),
        row("inf-cl", 8e-3, SHARP, rms_error=math.nan),
        row("ours", 1.0, "2 ranks", goals.TRAFFIC, sent_bytes=505),
        row("open_clip", 1.0, "2 ranks", goals.TRAFFIC, sent_bytes=1000),
    ]
