"""The contrastive loss against plain PyTorch and, where they are installed, published packages.

Providers are those of providers.py; `eager` builds the B x B logits in the features' dtype and takes both
softmaxes in float32. A package that is not installed is skipped, and so is a row that would not fit: `eager` and its
like where their B x B matrices exceed the free memory, anyone whose last batch predicts, at four times the time for
twice the batch, more than a second a call. `ours` alone runs a million pairs, once.

Features are normalised, of a decaying spectrum, and paired, so that probabilities are neither 0 nor 1, as in training:
of 32768 pairs with 512 features, a pair's cosine is 0.41 ± 0.08 and the loss 0.8 at scale 50 and 0.9 at scale 100.

Counted for every provider alike, whatever it spends: FLOPs as 1u forward and 4u with backward, u = 2 B^2 D, the least
that two-sided InfoNCE needs where logits are made again (logits twice, then one product a tower); one direction with
fixed keys needs 3u. Bytes: both towers read once, with backward again, and their gradients written.

error: largest miss against float64 (exact.py) relative to the largest exact value, forward that of the
loss, else the worst of `errors`: features' gradients at 256 rows, the scale's gradient. rms_error: root mean square of
the features' miss over that of the exact gradient, the worse tower; rms_rounding: the same for the exact gradient
rounded to the features' dtype, which none that returns that dtype is likely to beat.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.contrastive.baselines import eager_fixed_keys, eager_soft
from benchmarks.contrastive.exact import Exact, exact_loss
from benchmarks.contrastive.goals import BOTH, FIXED_KEYS, FORWARD, SOFT, label
from benchmarks.contrastive.peers import Loss
from benchmarks.contrastive.providers import PROVIDERS, Provider
from benchmarks.harness.bench import Bench
from benchmarks.harness.machine import ON_GPU
from eclip.kernels.contrastive import contrastive_loss

SIZES = {"4k": 2**12, "16k": 2**14, "32k": 2**15, "65k": 2**16, "131k": 2**17, "262k": 2**18, "1M": 2**20}
LAST = ("262k", "1M")  # seconds a row
SHRINK = 1 if ON_GPU else 256  # a CPU takes as many pairs fewer, and 64 features
EXACT_UP_TO = "131k"  # float64 is 18 TFLOP there: about a second of an H200
LONGEST_CALL = 1.0  # seconds that a call may be predicted to take
ONCE = 2**20  # pairs from which a call takes seconds, and runs once
SAMPLED = 256
SPAN = {
    "ours": ("4k", "1M"),
    "compile": ("32k", "32k"),  # a compile takes 10 to 40 s
    "reference": ("32k", "32k"),  # float32 products are slow
    "cublas blocks": ("16k", "262k"),  # its block is 8192 wide
}
"""Least and largest batch, for those that do not run from 4k to 262k (131k with B x B matrices)."""


class Case(NamedTuple):
    """One row. The first four name the problem."""

    size: str
    dim: int
    scale: float
    op: str
    provider: str

    def __str__(self) -> str:
        peer = "peer:" if PROVIDERS[self.provider].package else ""  # so that -k can choose them
        return f"{self.op.split(' ', 1)[1]}-{self.size}-D{self.dim}-scale{self.scale:g}-{peer}{self.provider}"

    @property
    def batch(self) -> int:
        return SIZES[self.size] // SHRINK


def by_size() -> Iterator[Case]:
    """Small batches first: a row's time predicts that of the next batch."""
    for size, batch in SIZES.items():
        for name, provider in PROVIDERS.items():
            first, last = SPAN.get(name, ("4k", "131k" if provider.bytes_per_logit else "262k"))
            if SIZES[first] <= batch <= SIZES[last]:
                yield Case(size, 512, 50.0, BOTH, name)


LATER = ("131k", *LAST)
"""Sizes whose rows come after those that are judged beside them."""


def cases() -> Iterator[Case]:
    """Everything but ids and the LAST sizes: what is judged first, since a part of a run may be cut off."""
    yield from (case for case in by_size() if case.size not in LATER)
    # The compiled logits are eager's: `compile` needs no accuracy row of its own.
    yield from (Case("32k", 512, 100.0, BOTH, name) for name in PROVIDERS if name != "compile")
    yield from (case for case in by_size() if case.size == "131k")
    for dim in (768, 1024):
        yield from (Case("32k", dim, 50.0, BOTH, name) for name in ("eager", "ours"))
    yield from (Case("65k", 768, 50.0, BOTH, name) for name in ("cublas blocks", "ours"))
    yield from (case._replace(op=FORWARD) for case in by_size() if case.size in ("4k", "32k", "131k"))


# --- Problems ---------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def features(size: str, dim: int) -> tuple[Tensor, Tensor]:
    """Image and text features (B, D) of a named size, the same each time; kept for the cases that follow on it."""
    batch, dim = SIZES[size] // SHRINK, dim if ON_GPU else dim // 8
    spectrum = torch.arange(1, dim + 1, device=Bench.device) ** -0.35
    image, text, shared = (Bench.draw(batch, dim, dtype=torch.float32, seed=seed).mul_(spectrum) for seed in range(3))
    image, text = (F.normalize(own.mul_(1.2).add_(shared), dim=1) for own in (image, text))
    return image.to(Bench.dtype), text.to(Bench.dtype)


def product_ids(batch: int) -> Tensor:
    """Two rows in three share their id with another: catalogue entries of a batch."""
    return torch.arange(batch, device=Bench.device) * 2 // 3


def sampled_rows(batch: int) -> Tensor:
    return torch.arange(0, batch, max(1, batch // SAMPLED), device=Bench.device)


@functools.cache
def exact(size: str, dim: int, scale: float, op: str) -> Exact:
    image, text = features(size, dim)
    sample = sampled_rows(len(image))
    if op == FORWARD:
        return exact(size, dim, scale, BOTH)  # float64 takes a second of an H200 for 131072 pairs
    if op == BOTH:
        return exact_loss(image, text, scale, sample)
    ids = product_ids(len(image))
    if op == SOFT:
        return exact_loss(image, text, scale, sample, ids=ids, positives="soft")
    return exact_loss(image, text, scale, sample, ids=ids, positives="mask", both=False)


def note_errors(bench: Bench, want: Exact, found: dict[str, Tensor]) -> None:
    """`found`: the loss, or gradients by name; features' gradients of all rows."""
    errors: dict[str, float] = {}
    rms: dict[str, float] = {}
    rounding: dict[str, float] = {}
    for name, value in found.items():
        target: Tensor = getattr(want, name)
        if target.ndim:
            value = value[sampled_rows(len(value))]
            rms[name] = _rms(value.double() - target) / _rms(target)
            rounding[name] = _rms(target.to(value.dtype).double() - target) / _rms(target)
        errors[name] = float((value.double() - target).abs().max() / target.abs().max())
    columns: dict[str, Any] = {"error": max(errors.values()), "errors": errors}
    if rms:
        columns |= {"rms_error": max(rms.values()), "rms_rounding": max(rounding.values())}
    bench.note(**columns)


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


# --- What does not run, and why ---------------------------------------------------------------------------------------

measured: dict[tuple[str, str], tuple[int, float]] = {}
"""(provider, op) -> batch and seconds of its last row with 512 features."""


def skip_unless_it_fits(case: Case, provider: Provider) -> None:
    if reason := provider.missing():
        pytest.skip(reason)
    if not ON_GPU:
        return
    matrices, free = provider.bytes_per_logit * case.batch**2, torch.cuda.mem_get_info()[0]
    if matrices > free:
        pytest.skip(
            f"{case.provider} would hold {matrices / 1e9:.0f} GB of B x B matrices, {free / 1e9:.0f} GB are free"
        )
    batch, seconds = measured.get((case.provider, case.op), (case.batch, 0.0))
    predicted = seconds * (case.batch / batch) ** 2
    if predicted > LONGEST_CALL and case.batch < ONCE:
        pytest.skip(f"{case.provider} would take {predicted:.1f} s a call: it took {seconds:.2f} s for {batch} pairs")


def timed(bench: Bench, call: Callable[[], Any], case: Case, **columns: Any) -> Any:
    """Time one call and record the row of `case`."""
    image, text = features(case.size, case.dim)
    towers, backward = image.nbytes + text.nbytes, case.op != FORWARD
    work = {FORWARD: 1, FIXED_KEYS: 3}.get(case.op, 4)
    result = bench(
        call,
        op=case.op,
        provider=case.provider,
        shape=label(len(image), image.shape[1], case.scale),
        bytes=3 * towers if backward else towers,
        flops=work * 2 * len(image) ** 2 * image.shape[1],
        once=case.batch >= ONCE,
        graph=not PROVIDERS[case.provider].syncs,
        **columns,
    )
    if bench.seconds and case.dim == 512:
        measured[case.provider, case.op] = case.batch, bench.seconds
    return result


# --- Benchmarks -------------------------------------------------------------------------------------------------------


def load(provider: Provider) -> Loss:
    """The provider's loss; skips the test where its package lacks another (quack its cutlass, for example)."""
    try:
        return provider.load()
    except (ImportError, OSError) as error:
        if provider.package is None:
            raise
        pytest.skip(f"{provider.package} cannot be imported: {' '.join(str(error).split())[:100]}")


@pytest.mark.parametrize("case", list(cases()), ids=str)
def test_loss(bench: Bench, case: Case) -> None:
    run(bench, case)


def run(bench: Bench, case: Case) -> None:
    provider = PROVIDERS[case.provider]
    skip_unless_it_fits(case, provider)
    columns: dict[str, Any] = {"version": version} if (version := provider.version()) else {}
    if provider.remark:
        columns |= {"remark": provider.remark}
    loss = load(provider)
    if case.op == FORWARD:
        image, text = features(case.size, case.dim)
        scale = torch.tensor(case.scale, device=bench.device) if provider.scale_gradient else case.scale
        with torch.no_grad():
            found = {"loss": timed(bench, lambda: loss(image, text, scale), case, **columns)}
    else:
        found = gradients(bench, loss, case, "" if provider.scale_gradient else "scale", **columns)
    if SIZES[case.size] <= SIZES[EXACT_UP_TO]:
        note_errors(bench, exact(case.size, case.dim, case.scale, case.op), found)


def gradients(bench: Bench, loss: Loss, case: Case, without: str = "", **columns: Any) -> dict[str, Tensor]:
    """Time forward and backward; return the gradients by name. `without`: the input that gets none."""
    image, text = features(case.size, case.dim)
    fixed: dict[str, Any] = {"image": image, "text": text, "scale": case.scale}
    wanted = {name: torch.as_tensor(fixed[name], device=bench.device) for name in fixed if name != without}

    def call(*leaves: Tensor) -> Tensor:
        inputs = {**fixed, **dict(zip(wanted, leaves, strict=True))}
        return loss(inputs["image"], inputs["text"], inputs["scale"])

    one = torch.ones((), device=bench.device)
    found = timed(bench, bench.backward(call, *wanted.values(), seeds=[one]), case, **columns)
    return dict(zip(wanted, found, strict=True))


@pytest.mark.parametrize("provider", ["eager", "ours"])
@pytest.mark.parametrize("op", [SOFT, FIXED_KEYS])
def test_ids(bench: Bench, op: str, provider: str) -> None:
    case = Case("32k", 512, 50.0, op, provider)
    ids = product_ids(case.batch)
    if provider == "eager":
        skip_unless_it_fits(case, PROVIDERS["eager"])
        loss: Loss = functools.partial(eager_soft if op == SOFT else eager_fixed_keys, ids=ids)
    elif op == SOFT:
        loss = functools.partial(contrastive_loss, image_ids=ids, positives="soft")
    else:
        loss = functools.partial(contrastive_loss, image_ids=ids, positives="mask", sides="rows")
    found = gradients(bench, loss, case, "" if op == SOFT else "text")
    note_errors(bench, exact(case.size, case.dim, case.scale, op), found)


@pytest.mark.parametrize("case", [case for case in by_size() if case.size in LAST], ids=str)
def test_largest(bench: Bench, case: Case) -> None:
    """After all else: a million pairs take as long as the rest of our rows together."""
    run(bench, case)
