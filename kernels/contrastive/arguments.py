"""Checks of arguments that the contrastive losses share; every ValueError names the value, the rule and the way out.

None of them waits for the device: values in GPU memory are not looked at.
"""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..launch import accumulate_dtype, autocast_dtype


def check_option(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, allowed))}")


def check_devices(**tensors: Tensor | None) -> None:
    """All tensors that are there lie on one device."""
    where = {name: str(x.device) for name, x in tensors.items() if x is not None}
    if len(set(where.values())) > 1:
        listed = ", ".join(f"{name} on {device}" for name, device in where.items())
        raise ValueError(f"arguments lie on several devices ({listed}); move them to one")


def check_features(image: Tensor, text: Tensor, *, more_texts: bool, may_be_empty: bool) -> None:
    """(B, D) both, of one floating dtype (under autocast, after its cast). more_texts: at least as many texts."""
    shapes = f"image_features {tuple(image.shape)} and text_features {tuple(text.shape)}"
    if image.ndim != 2 or text.ndim != 2 or image.shape[1] != text.shape[1] or not image.shape[1]:
        raise ValueError(f"{shapes} must be (B, D) with the same D >= 1")
    if autocast_dtype(image) != autocast_dtype(text) or not image.is_floating_point():
        raise ValueError(
            f"image_features ({image.dtype}) and text_features ({text.dtype}) must share a floating dtype; cast one"
        )
    if more_texts and text.shape[0] < image.shape[0]:
        raise ValueError(f"{shapes} must be at least as many texts as images; text i is the positive of image i")
    if not more_texts and text.shape[0] != image.shape[0]:
        raise ValueError(f"{shapes} must have equally many rows; text i is the positive of image i")
    if not image.shape[0] and not may_be_empty:
        raise ValueError(f"{shapes} hold no pair; pass at least one")


def as_one_number(name: str, value: Tensor | float, like: Tensor) -> Tensor:
    """A tensor of one element: `value` itself, or a number as a constant on the device of `like`."""
    if not isinstance(value, Tensor):
        # Not math.isfinite: under torch.compile(dynamic=True) the value is a symbol, which can only be compared.
        if not -math.inf < value < math.inf:
            raise ValueError(f"{name}={value} is not finite; clamp it")
        return like.new_full((), value, dtype=accumulate_dtype(like.dtype))
    if value.numel() != 1 or not value.is_floating_point():
        raise ValueError(f"{name} {tuple(value.shape)} of {value.dtype} must be one floating number")
    return value


def check_ids(
    positives: str, image_ids: Tensor | None, text_ids: Tensor | None, image: Tensor, text: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Return both ids as int64, text_ids from image_ids where left out; (None, None) for positives="diagonal"."""
    if positives == "diagonal":
        if image_ids is not None or text_ids is not None:
            raise ValueError("positives='diagonal' does not use ids; leave them out or choose other positives")
        return None, None
    if image_ids is None:
        raise ValueError(f"positives={positives!r} compares ids; pass image_ids, or choose 'diagonal'")
    if text_ids is None:
        text_ids = image_ids
    for name, ids, rows in (("image_ids", image_ids, image.shape[0]), ("text_ids", text_ids, text.shape[0])):
        if ids.shape != (rows,) or ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
            raise ValueError(f"{name} {tuple(ids.shape)} of {ids.dtype} must be ({rows},) integers, one a row")
    return image_ids.long(), text_ids.long()


def num_ranks(group: dist.ProcessGroup | None) -> int:
    return 1 if group is None else dist.get_world_size(group)


def check_rows_per_rank(
    rows_per_rank: Sequence[int] | None, image: Tensor, text: Tensor, group: dist.ProcessGroup | None
) -> None:
    """One entry a rank of the group; this rank's is its number of images and of texts."""
    if rows_per_rank is None:
        return
    rank = 0 if group is None else dist.get_rank(group)
    if len(rows_per_rank) != num_ranks(group):
        raise ValueError(
            f"rows_per_rank={tuple(rows_per_rank)} must have an entry for each of the group's {num_ranks(group)} ranks"
        )
    if not image.shape[0] == text.shape[0] == rows_per_rank[rank]:
        raise ValueError(
            f"rows_per_rank={tuple(rows_per_rank)} says {rows_per_rank[rank]} for rank {rank}, which has "
            f"{image.shape[0]} images and {text.shape[0]} texts; correct it, or leave it out to have counts exchanged"
        )
