"""What slot attention was built to reach, judged on the rows of a run.

Names of ops and shapes are those of bench_slot_attention.py, which takes them from here.
"""

from collections.abc import Iterable, Iterator

from benchmarks.harness.goals import Goal, Row, goal

Key = tuple[str, str, str]
BLOCK = "slot_attention"
CORE = "slot_attention core"
SIX_BLOCKS = "slot_attention, six blocks"
DECODER = "instance decoder, six blocks"
FORWARD, BACKWARD, BOTH = "forward", "backward", "forward+backward"


def label(batch: int, num_tokens: int, queries: int, dim: int, heads: int) -> str:
    """The shape column of a row."""
    return f"B={batch} N={num_tokens} T={queries} D={dim} h={heads}"


SHAPE = label(4096, 196, 20, 768, 1)


def judge(rows: Iterable[Row], device: str) -> list[Goal]:
    """Every goal that can be judged from `rows` of `device`; on a CPU those that no clock decides."""
    rows = [row for row in rows if row.get("dtype") == "bfloat16"]
    found = {(row["op"], row["provider"], row["shape"]): row for row in rows}
    saved = list(_saved(found))
    return saved if device == "cpu" else [*_core(found), *_block(found), *saved, _accuracy(found)]


def _core(found: dict[Key, Row]) -> Iterator[Goal]:
    for mode, least in ((FORWARD, 0.6), (BACKWARD, 0.5)):
        share = found.get((f"{CORE} {mode}", "ours", SHAPE), {}).get("copy_share")
        yield goal(f"core {mode}, {SHAPE}: share of the copy bandwidth", f">= {least:.0%}", share, "{:.0%}", least)


def _block(found: dict[Key, Row]) -> Iterator[Goal]:
    for other, least in (("eager", 3.5), ("compile", 3.0)):
        theirs, ours = (found.get((f"{BLOCK} {BOTH}", name, SHAPE)) for name in (other, "ours"))
        ratio = theirs["seconds"] / ours["seconds"] if theirs and ours else None
        text = f"block {BOTH}, {SHAPE}: times as fast as {other}"
        yield goal(text, f">= {least}", ratio, "{:.2f}", least)


def _saved(found: dict[Key, Row]) -> Iterator[Goal]:
    parts = (
        ("slot attention of six blocks: saved activations, of eager's", f"{SIX_BLOCKS} {BOTH}", 0.15),
        (
            "the whole decoder: the same (no goal: FFN and self-attention among the queries keep theirs)",
            f"{DECODER} {BOTH}",
            None,
        ),
    )
    for text, op, most in parts:
        pairs = [(ours, theirs) for ours, theirs in _pairs(found) if ours["op"] == op]
        shares = [ours["saved"] / theirs["saved"] for ours, theirs in pairs]
        required = f"<= {most:.0%}" if most else "-"
        yield goal(text, required, max(shares, default=None), "{:.1%}", most, at_most=True)


def _accuracy(found: dict[Key, Row]) -> Goal:
    """The worst ratio of our error to PyTorch's, over all rows and all tensors that have one."""
    worst: tuple[float, str] | None = None
    for ours, theirs in _pairs(found):
        for name in ours.get("errors", {}).keys() & theirs.get("errors", {}).keys():
            ratio = ours["errors"][name] / max(theirs["errors"][name], 1e-5)
            worst = max(worst or (0.0, ""), (ratio, f"{name} of {ours['op']}, {ours['shape']}"))
    text = "error against float64, of eager's in the same dtype" + (f"; worst: {worst[1]}" if worst else "")
    return goal(text, "<= 2", worst[0] if worst else None, "{:.2f}", 2.0, at_most=True)


def _pairs(found: dict[Key, Row]) -> Iterator[tuple[Row, Row]]:
    """Our rows, each with eager's of the same op and shape."""
    for (op, provider, shape), row in found.items():
        if provider == "ours" and (op, "eager", shape) in found:
            yield row, found[op, "eager", shape]
