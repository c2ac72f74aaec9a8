"""What the matrix of logits is made of: where equal ids stand, and the shift of its exp()."""

import pytest
import torch

from eclip.kernels.contrastive.problem import CODE, END, ORDER, START, find_matches, magnitudes, safe_shift
from tests.kernels.contrastive.checks import make_arguments, statistics

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


def test_shift_is_zero_while_logits_are_small() -> None:
    arguments = make_arguments(40, 24, scale=60.0)
    assert statistics(arguments)[2] == 0
    image, text = arguments["image_features"], arguments["text_features"]
    bias = torch.tensor([-5.0, 10.0])
    largest = magnitudes(image, text, bias)
    assert torch.allclose(safe_shift(largest, torch.tensor(-60.0), "rows"), torch.tensor(6.0))
    assert safe_shift(largest, torch.tensor(1e4), "sigmoid") == 0
    assert magnitudes(image[:0], text[:0], bias[:0]).tolist() == [0, 0, -torch.inf]
