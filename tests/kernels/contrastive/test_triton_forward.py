"""The Triton kernels under the contrastive losses where the public functions do not look: panels, blocks, fallbacks.

On the paths that run them, interpreted and on a GPU. What all paths share is tested in test_contrastive_loss.py and
test_sigmoid_loss.py.
"""

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from eclip.kernels.contrastive import contrastive_loss, contrastive_loss_reference, sigmoid_loss, sigmoid_loss_reference
from eclip.kernels.contrastive import ranks as contrastive_distributed
from eclip.kernels.contrastive import triton_backward as contrastive_backward_kernels
from eclip.kernels.contrastive import triton_forward as contrastive_kernels
from eclip.kernels.contrastive import triton_tiles as contrastive_tile
from eclip.kernels.contrastive.ops import keeps_logits, pair_gradients, pair_statistics
from eclip.kernels.contrastive.plain import plain_gradients, plain_statistics
from eclip.kernels.contrastive.positives import CODE, END, ORDER, START, find_matches, positive_weights
from eclip.kernels.contrastive.problem import Logits, Wanted, magnitudes, safe_shift
from tests.kernels.contrastive.checks import Arguments, check, make_arguments, on, value_and_grads, with_features


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Paths that launch kernels."""
    if request.param == "interpreter":
        return request.getfixturevalue("interpreter")
    return torch.device(request.param)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers so small that a batch of 300 takes several panels of rows and several blocks of G."""
    monkeypatch.setattr(contrastive_kernels, "_PANEL_NUMBERS", 200)
    monkeypatch.setattr(contrastive_kernels, "_PROGRAMS", 1)
    monkeypatch.setattr(contrastive_backward_kernels, "_BLOCK_ROWS", 64)
    monkeypatch.setattr(contrastive_backward_kernels, "_BLOCK_BYTES", 1)


check_contrastive = functools.partial(check, contrastive_loss, contrastive_loss_reference)


@pytest.mark.parametrize(("dtype", "batch"), [(torch.float32, 100), (torch.bfloat16, 300)])
def test_panels_and_blocks(device: torch.device, tiny: None, dtype: torch.dtype, batch: int) -> None:
    for positives in ("soft", "mask"):
        arguments = on(device, make_arguments(batch, 16, positives, bias=positives == "soft"))
        check_contrastive(with_features(arguments, dtype))
    ids = on(device, make_arguments(batch, 16, "mask"))
    arguments = {**with_features(ids, dtype), "logit_bias": torch.tensor(-3.0, device=device)}
    check(sigmoid_loss, sigmoid_loss_reference, arguments)


def gradients(
    logits: Logits, row_stat: torch.Tensor, col_stat: torch.Tensor, factor: float
) -> tuple[torch.Tensor, ...]:
    """Of images, texts, scale and bias, by the op."""
    shift, offset, kind, mode = logits[-4:]
    factor_ = torch.tensor(factor, device=shift.device)
    wanted = (True, True, True, logits.bias is not None)
    return pair_gradients(*logits[:-4], row_stat, col_stat, shift, None, factor_, offset, kind, mode, *wanted)


def exact_gradients(
    logits: Logits, row_stat: torch.Tensor, col_stat: torch.Tensor, factor: float
) -> tuple[torch.Tensor, ...]:
    """The same in float64, by PyTorch."""
    statistics = row_stat.double(), col_stat.double(), torch.tensor(factor, device=row_stat.device).double()
    return plain_gradients(in_float64(logits), *statistics, Wanted(True, True, True, logits.bias is not None))


def in_float64(logits: Logits) -> Logits:
    return Logits._make(x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in logits)


@pytest.mark.parametrize("positives", ["diagonal", "soft", "mask"])
@pytest.mark.parametrize("kind", ["both", "rows", "sigmoid"])
def test_rows_that_are_not_paired_with_the_first_columns(device: torch.device, kind: str, positives: str) -> None:
    """As on a rank: pairs begin at a column in the middle. And partly or wholly before the first or beyond the last."""
    arguments = on(device, make_arguments(20, 16, positives, keys=50, bias=True))
    image, text, scale, bias = (arguments[n] for n in ("image_features", "text_features", "logit_scale", "bias"))
    mode = {"soft": "share"}.get(positives, positives)
    shift = safe_shift(magnitudes(image, text, bias), scale, kind)
    matches = (None, None)
    if positives != "diagonal":
        matches = find_matches(arguments["image_ids"], arguments["text_ids"], mode)
    weights = (torch.rand(20, device=device), torch.rand(50, device=device))
    for offset in (17, -8, 45, -20):
        logits = Logits(image, text, scale, bias, *matches, *weights, shift, offset, kind, mode)
        statistics, exact = pair_statistics(logits, None), plain_statistics(in_float64(logits))
        ours = statistics + gradients(logits, *statistics[:2], 0.5)
        theirs = exact + exact_gradients(logits, *exact[:2], 0.5)
        for found, expected in zip(ours, theirs, strict=True):
            torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)


# --- The shift and its fallback ---------------------------------------------------------------------------------------


def opposed(batch: int, dim: int, **options: Any) -> Arguments:
    """All cosines near -1: at scale 117 every exp(s - shift) is 0 in fp32."""
    arguments = make_arguments(batch, dim, scale=117.0, **options)
    image, text = arguments["image_features"], arguments["text_features"]
    centre = image.mean(0)
    arguments["image_features"] = F.normalize(centre + 0.05 * image, dim=-1)
    arguments["text_features"] = F.normalize(-centre + 0.05 * text, dim=-1)
    return arguments


def statistics(arguments: Arguments, kind: str = "both") -> tuple[torch.Tensor, ...]:
    """row_stat, col_stat and shift of diagonal positives."""
    image, text, scale = (arguments[name] for name in ("image_features", "text_features", "logit_scale"))
    weights = positive_weights(image, len(text), None, 0, kind, "diagonal")
    shift = safe_shift(magnitudes(image, text, None), scale, kind)
    logits = Logits(image, text, scale, None, None, None, *weights, shift, 0, kind, "diagonal")
    rows, cols, _ = pair_statistics(logits, None)
    return rows, cols, shift


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("positives", ["diagonal", "soft"])
def test_sums_that_underflow_are_computed_again(device: torch.device, dtype: torch.dtype, positives: str) -> None:
    arguments = on(device, with_features(opposed(70, 24, positives=positives), dtype))
    rows, cols, shift = statistics(arguments)
    assert shift > 50 and torch.maximum(rows, cols).max() < shift - contrastive_kernels.UNDERFLOW
    check_contrastive(arguments)


@pytest.mark.parametrize("column", [False, True])
def test_one_row_or_column_that_underflows(device: torch.device, tiny: None, column: bool) -> None:
    """The others' sums are in range, and all sums of the other side. Everything is computed again, several panels."""
    arguments = make_arguments(200, 24, scale=117.0)
    arguments["image_features"][150] = F.normalize(-arguments["text_features"].mean(0), dim=-1)
    arguments["text_features"] = F.normalize(
        arguments["text_features"].mean(0) + 0.05 * arguments["text_features"], dim=-1
    )
    arguments["image_features"][:150] = F.normalize(
        arguments["image_features"][:150] + arguments["text_features"][:150], dim=-1
    )
    if column:
        towers = arguments["text_features"], arguments["image_features"]
        arguments["image_features"], arguments["text_features"] = towers
    rows, cols, shift = statistics(on(device, arguments))
    low, high = (cols, rows) if column else (rows, cols)
    limit = shift - contrastive_kernels.UNDERFLOW
    assert low[150] < limit < torch.minimum(low[:150].min(), high.min())
    check_contrastive(on(device, arguments))


def test_one_row_close_to_the_least_number(device: torch.device) -> None:
    """Its exp(s - shift) go from exp(-91) to exp(-81): a GPU makes 0 of those below exp(-87), the interpreter not."""
    arguments = make_arguments(100, 24, scale=117.0)
    arguments["image_features"][3] = axis = F.one_hot(torch.tensor(0), 24).float()
    text = arguments["text_features"]
    text[:, 0] = 0.0
    cosine = torch.linspace(-0.32, -0.24, 100)[:, None]
    arguments["text_features"] = F.normalize(text, dim=-1) * (1 - cosine**2).sqrt() + cosine * axis
    rows, _, shift = statistics(on(device, arguments))
    assert shift - 87 < rows[3] < shift - contrastive_kernels.UNDERFLOW
    check_contrastive(on(device, arguments))


def test_rows_without_terms_in_a_tile(device: torch.device) -> None:
    """Masked are all of a row's columns in the first tiles, while sums are computed again: there is no maximum yet."""
    arguments = opposed(150, 24, positives="mask", ids="distinct")
    for name in ("image_ids", "text_ids"):
        arguments[name][:100] = 7
    check_contrastive(on(device, arguments))


def test_features_that_are_not_normalised(device: torch.device) -> None:
    """The largest logit is found from norms."""
    arguments = make_arguments(40, 24, scale=3000.0)
    for name in ("image_features", "text_features"):
        arguments[name] *= torch.linspace(0.1, 1, 40)[:, None]
    assert statistics(on(device, arguments))[2] > 2900
    check_contrastive(on(device, arguments))


def test_shift_is_zero_while_logits_are_small() -> None:
    arguments = make_arguments(40, 24, scale=60.0)
    assert statistics(arguments)[2] == 0
    image, text = arguments["image_features"], arguments["text_features"]
    bias = torch.tensor([-5.0, 10.0])
    largest = magnitudes(image, text, bias)
    assert torch.allclose(safe_shift(largest, torch.tensor(-60.0), "rows"), torch.tensor(6.0))
    assert safe_shift(largest, torch.tensor(1e4), "sigmoid") == 0
    assert magnitudes(image[:0], text[:0], bias[:0]).tolist() == [0, 0, -torch.inf]


@pytest.mark.parametrize("where", ["image_features", "text_features"])
def test_nan_features_give_a_nan_loss(device: torch.device, tiny: None, where: str) -> None:
    arguments = on(device, make_arguments(150, 16))
    arguments[where][3, 5] = torch.nan
    assert contrastive_loss(**arguments).isnan()
    arguments = {**arguments, "logit_bias": -10.0}
    assert sigmoid_loss(**arguments).isnan()


# --- What the forward keeps -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positives", ["diagonal", "soft", "mask"])
@pytest.mark.parametrize("sides", ["both", "rows"])
def test_kept_logits_give_the_same_gradients(device: torch.device, tiny: None, positives: str, sides: str) -> None:
    arguments = make_arguments(100, 16, positives, scale=100.0, keys=100 if sides == "both" else 120, bias=True)
    arguments = {**on(device, with_features(arguments, torch.bfloat16)), "sides": sides}
    assert keeps_logits(arguments["image_features"], 120, sides, 2**16)
    for keep_bytes in (0, 2**16):
        check_contrastive(arguments, keep_bytes=keep_bytes, roundings=2 if keep_bytes else 1)


def test_kept_logits_that_underflow(device: torch.device) -> None:
    """What was kept is 0 everywhere: the backward computes logits again."""
    arguments = on(device, with_features(opposed(70, 24), torch.bfloat16))
    found, again = (value_and_grads(functools.partial(contrastive_loss, keep_bytes=k), arguments) for k in (2**20, 0))
    for name, value in again.items():
        assert torch.equal(found[name], value), name


def test_ranks_keep_only_whole_tiles(device: torch.device) -> None:
    """Else a block of columns would write into its neighbour."""
    image = torch.zeros(10, 64, dtype=torch.bfloat16, device=device)
    for start, stop, keeps in ((0, 256, True), (256, 512, True), (200, 456, False), (256, 500, False)):
        memory = contrastive_distributed._new_kept(image, 700, slice(start, stop), "both", 2**20)
        assert (memory is not None) == keeps


def test_keeps_only_where_it_fits(device: torch.device) -> None:
    half = torch.zeros(10, 8, dtype=torch.bfloat16, device=device)
    whole_tiles = 2 * 128 * 256
    assert keeps_logits(half, 12, "both", whole_tiles) and not keeps_logits(half, 12, "both", whole_tiles - 1)
    assert not keeps_logits(half, 12, "sigmoid", whole_tiles)  # its backward is one exp from the logits, and no row sum
    assert not keeps_logits(half.half(), 12, "both", whole_tiles)  # exp(64) is beyond fp16


def test_cpu_keeps_nothing() -> None:
    assert not keeps_logits(torch.zeros(10, 8, dtype=torch.bfloat16), 12, "both", 2**20)


# --- Parts ------------------------------------------------------------------------------------------------------------


ROW_IDS, COL_IDS = torch.tensor([5, 3, 5, 4, -7]), torch.tensor([3, 5, 1, 5, -7, 3])


@pytest.mark.parametrize("kept_rows", [slice(0, 5), slice(1, 4), slice(2, 2)])
@pytest.mark.parametrize("kept_cols", [slice(0, 6), slice(2, 5), slice(6, 6)])
def test_matches_list_equal_ids(kept_rows: slice, kept_cols: slice) -> None:
    """Of all rows and columns, and of those of a rank and of a block."""
    found = find_matches(ROW_IDS, COL_IDS).of_rows(kept_rows).of_columns(kept_cols)
    row_ids, col_ids = ROW_IDS[kept_rows], COL_IDS[kept_cols]
    for own_ids, own, other_ids, other in (
        (row_ids, found.rows, col_ids, found.cols),
        (col_ids, found.cols, row_ids, found.rows),
    ):
        assert own.dtype == torch.int32 and own.shape == (4, len(own_ids))
        for i, name in enumerate(own_ids):
            places = (other_ids == name).nonzero().flatten()
            assert other[ORDER, own[START, i] : own[END, i]].tolist() == places.tolist()
            assert (other[CODE] == own[CODE, i]).nonzero().flatten().tolist() == places.tolist()


def test_masks_need_codes_alone() -> None:
    rows, cols = find_matches(ROW_IDS, COL_IDS, "mask")
    everything = find_matches(ROW_IDS, COL_IDS)
    assert torch.equal(rows, everything.rows[:1]) and torch.equal(cols, everything.cols[:1])
    part = find_matches(ROW_IDS, COL_IDS, "mask").of_columns(slice(2, 5))
    assert torch.equal(part.rows, rows) and torch.equal(part.cols, cols[:, 2:5])


def test_small_softplus_keeps_its_digits(device: torch.device) -> None:
    """As of most pairs of a batch: exp(-12) beside 1."""
    arguments = on(device, make_arguments(40, 24, scale=1.0))
    image, text, scale = (arguments[name] for name in ("image_features", "text_features", "logit_scale"))
    bias, shift = torch.full((40,), -12.0, device=device), torch.zeros(1, device=device)
    weights = positive_weights(image, 40, None, 0, "sigmoid", "diagonal")
    logits = Logits(image, text, scale, bias, None, None, *weights, shift, 0, "sigmoid", "diagonal")
    found, exact = pair_statistics(logits, None)[0], plain_statistics(in_float64(logits))[0]
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("shape", [(1, 1), (16384, 32768), (5, 2**30), (2**20, 2**20), (16385, 70000)])
def test_blocks_cover_the_matrix_within_the_budget(shape: tuple[int, int]) -> None:
    image, text = (torch.empty(n, 8, dtype=torch.bfloat16, device="meta") for n in shape)
    blocks = contrastive_backward_kernels._blocks(image, text)
    for rows, cols in blocks:
        height, width = contrastive_tile.padded_shape(rows.stop - rows.start, cols.stop - cols.start)
        assert 2 * height * width <= max(contrastive_backward_kernels._BLOCK_BYTES, 2 * height * 256)
    covered = sum((rows.stop - rows.start) * (cols.stop - cols.start) for rows, cols in blocks)
    assert covered == shape[0] * shape[1]
    assert all(cols.start % 256 == 0 and rows.start % 128 == 0 for rows, cols in blocks)


def test_fp16_keeps_small_probabilities(device: torch.device) -> None:
    """Entries of G near 1e-7, where fp16 knows multiples of 6e-8. No row has its pair: that would hide them."""
    arguments = on(device, with_features(make_arguments(64, 64, scale=1.0), torch.float16))
    image, text, scale = (arguments[name] for name in ("image_features", "text_features", "logit_scale"))
    row_stat, none, shift = (torch.full((n,), x, device=device) for n, x in ((64, 16.0), (0, 0.0), (1, 0.0)))
    weights = (torch.ones(64, device=device), torch.zeros(64, device=device))
    logits = Logits(image, text, scale, None, None, None, *weights, shift, -64, "rows", "diagonal")
    # The factor lifts what is returned, in fp16, out of that range.
    found, exact = (take(logits, row_stat, none, 1024.0) for take in (gradients, exact_gradients))
    for ours, expected in zip(found[:3], exact[:3], strict=True):
        assert (ours - expected).abs().max() <= 2e-3 * expected.abs().max()


def test_every_output_element_is_written(device: torch.device) -> None:
    """Uninitialised memory is filled with NaN; padding to tiles must leave none behind."""
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3, device=device).isnan().all()
        for dtype, positives in ((torch.float32, "soft"), (torch.bfloat16, "mask"), (torch.bfloat16, "diagonal")):
            arguments = on(device, with_features(make_arguments(131, 20, positives, bias=True), dtype))
            for name, value in value_and_grads(contrastive_loss, arguments).items():
                assert value.isfinite().all(), name
    finally:
        torch.use_deterministic_algorithms(was)


@pytest.mark.parametrize("scale", [50.0, 100.0])
@pytest.mark.parametrize("keep_bytes", [0, 2**20])
def test_gradients_are_better_than_from_half_precision_logits(
    device: torch.device, scale: float, keep_bytes: int
) -> None:
    """As training has them: pairs are alike and the loss is small. Half the error of logits in bf16 at most, in rms."""
    arguments = make_arguments(128, 128, scale=scale)
    image, text = arguments["image_features"], arguments["text_features"]
    arguments["text_features"] = F.normalize(0.5 * image + text, dim=-1)
    arguments = on(device, with_features(arguments, torch.bfloat16))
    exact = value_and_grads(contrastive_loss_reference, arguments, torch.float64)
    ours = value_and_grads(functools.partial(contrastive_loss, keep_bytes=keep_bytes), arguments)
    rough = value_and_grads(half_precision_logits, arguments)
    for name in ("image_features", "text_features"):
        error, allowed = ((found[name] - exact[name]).square().mean().sqrt() for found in (ours, rough))
        assert error <= allowed / 2, f"{name}: {error:.2e}, half-precision logits {allowed:.2e}"


def half_precision_logits(
    image_features: torch.Tensor, text_features: torch.Tensor, logit_scale: torch.Tensor, positives: str
) -> torch.Tensor:
    """The usual few lines: a product rounded to bf16, the rest in fp32."""
    logits = logit_scale * (image_features @ text_features.T).float()
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
