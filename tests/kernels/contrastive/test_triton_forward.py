"""The Triton kernels under the contrastive losses where the public functions do not look: panels, the shift's fallback.

On the paths that launch kernels, interpreted and on a GPU. What all paths share is tested in test_loss.py and
test_sigmoid.py.
"""

import pytest
import torch
import torch.nn.functional as F

from eclip.kernels.contrastive import contrastive_loss, sigmoid_loss, sigmoid_loss_reference, triton_forward
from eclip.kernels.contrastive.ops import pair_statistics
from eclip.kernels.contrastive.plain import plain_statistics
from eclip.kernels.contrastive.problem import Logits, find_matches, magnitudes, positive_weights, safe_shift
from tests.kernels.contrastive.checks import (
    check,
    check_contrastive,
    exact_gradients,
    gradients,
    in_float64,
    make_arguments,
    on,
    opposed,
    statistics,
    value_and_grads,
    with_features,
)


@pytest.mark.parametrize(("dtype", "batch"), [(torch.float32, 100), (torch.bfloat16, 300)])
def test_panels_and_blocks(device: torch.device, tiny: None, dtype: torch.dtype, batch: int) -> None:
    for positives in ("soft", "mask"):
        arguments = on(device, make_arguments(batch, 16, positives, bias=positives == "soft"))
        check_contrastive(with_features(arguments, dtype))
    ids = on(device, make_arguments(batch, 16, "mask"))
    arguments = {**with_features(ids, dtype), "logit_bias": torch.tensor(-3.0, device=device)}
    check(sigmoid_loss, sigmoid_loss_reference, arguments)


@pytest.mark.parametrize("positives", ["diagonal", "all", "mask"])
@pytest.mark.parametrize("sides", ["both", "rows", "sigmoid"])
def test_rows_that_are_not_paired_with_the_first_columns(device: torch.device, sides: str, positives: str) -> None:
    """As on a rank: pairs begin at a column in the middle. And partly or wholly before the first or beyond the last."""
    arguments = on(device, make_arguments(20, 16, positives, keys=50, bias=True))
    image, text, scale, bias = (arguments[n] for n in ("image_features", "text_features", "logit_scale", "bias"))
    shift = safe_shift(magnitudes(image, text, bias), scale, sides)
    matches = (None, None)
    if positives != "diagonal":
        matches = find_matches(arguments["image_ids"], arguments["text_ids"], positives)
    weights = (torch.rand(20, device=device), torch.rand(50, device=device))
    for offset in (17, -8, 45, -20):
        logits = Logits(image, text, scale, bias, *matches, *weights, shift, offset, sides, positives)
        statistics, exact = pair_statistics(logits, None), plain_statistics(in_float64(logits))
        ours = statistics + gradients(logits, *statistics[:2], 0.5)
        theirs = exact + exact_gradients(logits, *exact[:2], 0.5)
        for found, expected in zip(ours, theirs, strict=True):
            torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)


# --- The shift and its fallback ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("positives", ["diagonal", "soft"])
def test_sums_that_underflow_are_computed_again(device: torch.device, dtype: torch.dtype, positives: str) -> None:
    arguments = on(device, with_features(opposed(70, 24, positives=positives), dtype))
    rows, cols, shift = statistics(arguments)
    assert shift > 50 and torch.maximum(rows, cols).max() < shift - triton_forward.UNDERFLOW
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
    limit = shift - triton_forward.UNDERFLOW
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
    assert shift - 87 < rows[3] < shift - triton_forward.UNDERFLOW
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


@pytest.mark.parametrize("where", ["image_features", "text_features"])
def test_nan_features_give_a_nan_loss(device: torch.device, tiny: None, where: str) -> None:
    arguments = on(device, make_arguments(150, 16))
    arguments[where][3, 5] = torch.nan
    assert contrastive_loss(**arguments).isnan()
    arguments = {**arguments, "logit_bias": -10.0}
    assert sigmoid_loss(**arguments).isnan()


# --- Parts ------------------------------------------------------------------------------------------------------------


def test_small_softplus_keeps_its_digits(device: torch.device) -> None:
    """As of most pairs of a batch: exp(-12) beside 1."""
    arguments = on(device, make_arguments(40, 24, scale=1.0))
    image, text, scale = (arguments[name] for name in ("image_features", "text_features", "logit_scale"))
    bias, shift = torch.full((40,), -12.0, device=device), torch.zeros(1, device=device)
    weights = positive_weights(image, 40, None, 0, "sigmoid", "diagonal")
    logits = Logits(image, text, scale, bias, None, None, *weights, shift, 0, "sigmoid", "diagonal")
    found, exact = pair_statistics(logits, None)[0], plain_statistics(in_float64(logits))[0]
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=0.0)


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
