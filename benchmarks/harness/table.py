"""Rows of one op as a Markdown table."""

from benchmarks.harness.goals import Row

COLUMNS = {
    "provider": lambda r: r.get("provider", r["name"]),
    "shape": lambda r: r.get("shape", ""),
    "dtype": lambda r: r.get("dtype", ""),
    "median": lambda r: f"{_time(r['seconds'])} ± {_time(r['iqr'])}",
    "fastest": lambda r: _time(r["fastest"]) if "fastest" in r else "",
    "x first": lambda r: f"{r['of_first']:.2f}" if "of_first" in r else "",
    "x first, fastest": lambda r: f"{r['of_fastest']:.2f}" if "of_fastest" in r else "",
    "x first, CPU time": lambda r: f"{r['of_work']:.2f}" if "of_work" in r else "",
    "x eager": lambda r: f"{r['speedup']:.2f}" if "speedup" in r else "",
    "must move": lambda r: _bytes(r.get("bytes")),
    "GB/s": lambda r: f"{r['gb_per_s']:.0f}" if "gb_per_s" in r else "",
    "of copy": lambda r: f"{r['copy_share']:.0%}" if "copy_share" in r else "",
    "TFLOP/s": lambda r: f"{r['tflop_per_s']:.3g}" if "tflop_per_s" in r else "",
    "mfu": lambda r: f"{r['mfu']:.0%}" if "mfu" in r else "",
    "products/s": lambda r: f"{r['products'] / r['seconds']:.0f}" if "products" in r else "",
    "images/s": lambda r: f"{r['images_per_s']:.0f}" if "images_per_s" in r else "",
    "share": lambda r: f"{r['share']:.0%} ({r['bound']})" if "share" in r else "",
    "peak memory": lambda r: _bytes(r.get("peak_bytes")),
    "saved": lambda r: _bytes(r.get("saved")),
    "held": lambda r: _bytes(r.get("held")),
    "error": lambda r: f"{r['error']:.1e}" if "error" in r else "",
    "timed as": lambda r: r.get("timing", ""),
}
STANDARD = {
    *("op", "provider", "shape", "dtype", "bytes", "flops", "device", "timing", "note", "seconds", "iqr", "rounds"),
    *("name", "gb_per_s", "copy_share", "tflop_per_s", "share", "bound", "peak_bytes", "speedup", "images_per_s"),
    *("saved", "held", "error", "errors", "fastest", "of_first", "of_fastest", "of_work", "mfu", "products"),
}


def _time(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e3)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def _bytes(count: int | None) -> str:
    if not count:
        return ""
    return f"{count / 1e6:.0f} MB" if count >= 1e7 else f"{count / 1e6:.3g} MB"


def table(rows: list[Row]) -> str:
    """One Markdown table; columns that are empty everywhere are left out, a benchmark's own columns come last."""
    own = dict.fromkeys(k for r in rows for k in r if k not in STANDARD)
    cells = {name: [cell(r) for r in rows] for name, cell in COLUMNS.items()}
    cells |= {k: [f"{v:.3g}" if isinstance(v := r.get(k, ""), float) else str(v) for r in rows] for k in own}
    cells = {name: column for name, column in cells.items() if any(column)}
    lines = [list(cells), ["---"] * len(cells), *zip(*cells.values(), strict=True)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
