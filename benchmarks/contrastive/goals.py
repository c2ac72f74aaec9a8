"""What the contrastive loss was built to reach, judged on the rows of a run.

Names of ops and shapes are those of bench_contrastive_loss.py and traffic.py, which take them from here.
Ratios, shares and bytes are judged on any GPU; milliseconds are goals of an H200, and only shown elsewhere.
"""

import math
from collections.abc import Iterable, Iterator

from benchmarks.harness.goals import Goal, Row, goal

FORWARD = "contrastive_loss forward"
BOTH = "contrastive_loss forward+backward"
SOFT = "contrastive_loss soft labels, forward+backward"
FIXED_KEYS = "contrastive_loss fixed keys, forward+backward"
TRAFFIC = "contrastive_loss traffic"
NOT_PEERS = ("ours", "reference", "cublas blocks")
"""Rows of other code that users would not call: float32 inside; our own algorithm without the kernels."""


def label(batch: int, dim: int, scale: float = 50) -> str:
    """The shape column of a row."""
    return f"B={batch} D={dim}" + (f" scale={scale:g}" if scale != 50 else "")


SHAPE = label(2**15, 512)
LARGE = label(2**17, 512)
HUGE = label(2**20, 512)
SHARP = label(2**15, 512, 100)

Found = dict[tuple[str, str, str], Row]


def judge(rows: Iterable[Row], device: str) -> list[Goal]:
    """Every goal that can be judged from `rows` of `device`; on a CPU the one that counts bytes between ranks."""
    found = {(row["op"], row["provider"], row["shape"]): row for row in rows if row.get("dtype") == "bfloat16"}
    traffic = list(_traffic(found))
    if device == "cpu":
        return traffic
    return [*_times(found, "H200" in device), *_peers(found), *_memory(found), *_accuracy(found), *traffic]


def _times(found: Found, on_h200: bool) -> Iterator[Goal]:
    for shape, most in ((SHAPE, 8.5), (LARGE, 130.0)):
        seconds = found.get((BOTH, "ours", shape), {}).get("seconds")
        text = f"{BOTH}, {shape}: milliseconds" + ("" if on_h200 else " (a goal for an H200, not judged here)")
        milliseconds = None if seconds is None else seconds * 1e3
        yield goal(text, f"<= {most:g}", milliseconds, "{:.3g}", most if on_h200 else None, at_most=True)
    share = found.get((BOTH, "ours", SHAPE), {}).get("share")
    yield goal(f"{BOTH}, {SHAPE}: share of the matmul rate at 4u", ">= 65%", share, "{:.0%}", 0.65)


def _peers(found: Found) -> Iterator[Goal]:
    ours = found.get((BOTH, "ours", SHAPE))
    times = {name: row["seconds"] for name, row in _at(found, SHAPE)}
    for name in ("eager", "open_clip"):
        ratio = times[name] / ours["seconds"] if ours and name in times else None
        yield goal(f"{BOTH}, {SHAPE}: times as fast as {name}", ">= 2", ratio, "{:.2f}", 2.0)
    fastest = min(times, key=lambda name: times[name], default=None)
    ratio = times[fastest] / ours["seconds"] if ours and fastest else None
    text = f"{BOTH}, {SHAPE}: times as fast as the fastest other" + (f", {fastest} of {len(times)}" if fastest else "")
    yield goal(text, ">= 1", ratio, "{:.2f}", 1.0)


def _memory(found: Found) -> Iterator[Goal]:
    for shape, most in ((LARGE, 3.0), (HUGE, 20.0)):
        row = found.get((BOTH, "ours", shape), {})
        peak = row["peak_bytes"] / 1e9 if "peak_bytes" in row else None
        text = f"{BOTH}, {shape}: completes; peak memory above the inputs in GB"
        yield goal(text, f"<= {most:g}", peak, "{:.2f}", most, at_most=True)


def _accuracy(found: Found) -> Iterator[Goal]:
    for scale, shape in ((50, SHAPE), (100, SHARP)):
        ours = found.get((BOTH, "ours", shape), {}).get("rms_error")
        errors = {name: row["rms_error"] for name, row in _at(found, shape) if "rms_error" in row}
        numbers = {name: math.inf if math.isnan(error) else error for name, error in errors.items()}
        best = min(numbers, key=lambda name: numbers[name], default=None)
        ratio = ours / numbers[best] if ours is not None and best else None
        text = f"features' gradients at scale {scale}, {SHAPE}: rms error, of the most accurate other's"
        yield goal(text + (f", {best} of {len(numbers)}" if best else ""), "<= 1", ratio, "{:.3f}", 1.0, at_most=True)


def _at(found: Found, shape: str) -> Iterator[tuple[str, Row]]:
    """Who else ran forward and backward of a shape."""
    for (op, name, where), row in found.items():
        if op == BOTH and where == shape and name not in NOT_PEERS:
            yield name, row


def _traffic(found: Found) -> Iterator[Goal]:
    sent = {name: row["sent_bytes"] for (op, name, _), row in found.items() if op == TRAFFIC}
    ratio = sent["ours"] / sent["open_clip"] if {"ours", "open_clip"} <= sent.keys() else None
    text = "two ranks, bf16: bytes that a rank sends, of open_clip's (one tower for two, and a few numbers a pair)"
    yield goal(text, "<= 51%", ratio, "{:.1%}", 0.51, at_most=True)
