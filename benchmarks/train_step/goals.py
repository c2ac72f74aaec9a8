"""What the training step was built to reach, judged on the rows of a run.

On a GPU: half of its peak, well ahead of the reference ops, and a batch of 16k products on one of them. On a CPU the
ratios are shown; nothing is required of them.
"""

from collections.abc import Iterable, Iterator

from benchmarks.harness.goals import Goal, Row, goal

OPTIONS = "train_step vit_b16"
MICRO = "train_step vit_b16, micro-batches"
LARGE = "train_step vit_b16, a large batch"
TEXT = "train_step vit_b16, text attention"
KINDS = "train_step vit_b16, where the time goes"
DEMO = {"demo": "train_step demo", "demo_towers": "train_step demo_towers"}
LARGE_BATCH = 2**14
JUDGED_ON = ("H100", "H200")


def label(batch: int, micro_batch: int | None = None) -> str:
    """The shape column of a row."""
    return f"B={batch}" + (f" micro={micro_batch}" if micro_batch else "")


def judge(rows: Iterable[Row], device: str) -> list[Goal]:
    """Every goal that can be judged from `rows` of `device`."""
    mine = [row for row in rows if row.get("op", "").startswith("train_step")]
    return list(_ratios(mine) if device == "cpu" else _on_gpu(mine, any(name in device for name in JUDGED_ON)))


def _on_gpu(rows: list[Row], judged: bool) -> Iterator[Goal]:
    options = {row["provider"]: row for row in rows if row["op"] == OPTIONS}
    ours = {name: row for name, row in options.items() if name.startswith("ours")}
    where = "" if judged else f" (a goal for {' and '.join(JUDGED_ON)}, not judged here)"
    best = max(ours, key=lambda name: ours[name].get("mfu", 0.0), default=None)
    mfu = ours[best].get("mfu") if best else None
    text = f"{OPTIONS}: share of the peak" + (f", {best}" if best else "") + where
    yield goal(text, ">= 45%", mfu, "{:.0%}", 0.45 if judged else None)
    fastest = min(ours, key=lambda name: ours[name]["seconds"], default=None)
    ratio = None
    if fastest and "reference" in options:
        ratio = options["reference"]["seconds"] / ours[fastest]["seconds"]
    yield goal(f"{OPTIONS}: times as fast as the reference ops", ">= 1.5", ratio, "{:.2f}", 1.5)
    large = [row["products"] for row in rows if row["op"] == LARGE]
    text = f"{LARGE}: products of a step that one GPU completes"
    yield goal(text, f">= {LARGE_BATCH}", max(large, default=None), "{}", LARGE_BATCH if judged else None)


def _ratios(rows: list[Row]) -> Iterator[Goal]:
    for op in DEMO.values():
        for row in rows:
            if row["op"] == op and row["provider"] in ("reference", "plain"):
                yield goal(f"{op}: times as fast as {row['provider']}", "-", row.get("of_first"), "{:.2f}", None)
