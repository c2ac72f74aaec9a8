"""The contrastive loss of one rank among several: what is exchanged, and the loss's share made of it.

Each rank holds its rows of the matrix of logits, S_l = scale I_l T_all^T. Its row sums are its own; column sums are
all-reduced; dI_l = scale G_l T_all is complete; dT = scale (sum over ranks of G_l^T I_l) is reduce-scattered in fp32.
So ONE tower moves once each way: B D numbers in, B D out, where gathering both towers needs twice that.

NCCL and gloo gather and scatter only equal pieces: rows are padded to the longest rank's count, and the padding is
dropped after.

Letters: R images and C texts of this rank, B pairs of all ranks, D features.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .contrastive_statistics import logit_gradients, logit_statistics, positive_weights, scale_gradient

# torch 2.13 renamed both and warns at every call of the old names; 2.11 has only those.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class RowExchange:
    """Where every rank's rows lie in the concatenation over ranks, and the collectives that move them.

    Constructing it is a collective. Raises ValueError on every rank when the ranks disagree on D or hold no row at all.
    """

    def __init__(self, image: Tensor, text: Tensor, group: dist.ProcessGroup) -> None:
        self.group = group
        self.world_size = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        own = torch.tensor([image.shape[0], text.shape[0], text.shape[1]], device=image.device)
        every = own.new_empty(self.world_size * 3)
        _all_gather(every, own, group=group)
        self.image_counts, self.text_counts, widths = map(list, zip(*every.view(-1, 3).tolist(), strict=True))
        if len(set(widths)) > 1:
            raise ValueError(
                f"features are {widths} wide on ranks 0 to {self.world_size - 1}; they must be equally wide"
            )
        if not sum(self.image_counts):
            raise ValueError("no rank passed a pair; pass at least one")
        self.text_offset = sum(self.text_counts[: self.rank])

    def gather_text(self, rows: Tensor) -> Tensor:
        """(C, ...) of each rank -> the concatenation over ranks."""
        return self._gather(rows, self.text_counts)

    def gather_images(self, rows: Tensor) -> Tensor:
        """(R, ...) of each rank -> the concatenation over ranks."""
        return self._gather(rows, self.image_counts)

    def _gather(self, rows: Tensor, counts: list[int]) -> Tensor:
        longest = max(counts)
        out = rows.new_empty((self.world_size * longest, *rows.shape[1:]))
        _all_gather(out, _pad(rows, longest), group=self.group)
        if min(counts) == longest:
            return out
        return torch.cat([piece[:count] for piece, count in zip(out.split(longest), counts, strict=True)])

    def reduce_scatter_text(self, rows: Tensor) -> Tensor:
        """The concatenation over ranks, one per rank -> this rank's rows of their sum."""
        counts, longest = self.text_counts, max(self.text_counts)
        if min(counts) != longest:
            rows = torch.cat([_pad(piece, longest) for piece in rows.split(counts)])
        out = rows.new_empty((longest, *rows.shape[1:]))
        _reduce_scatter(out, rows.contiguous(), group=self.group)
        return out[: counts[self.rank]]

    def logsumexp(self, partial: Tensor) -> Tensor:
        """log of the sum over ranks of exp(partial); partial may be -inf on some ranks, not on all."""
        largest = partial.clone()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.group)
        total = (partial - largest).exp()
        dist.all_reduce(total, group=self.group)
        return largest + total.log()


def _pad(rows: Tensor, count: int) -> Tensor:
    if rows.shape[0] == count:
        return rows.contiguous()
    return torch.cat([rows, rows.new_zeros((count - rows.shape[0], *rows.shape[1:]))])


class _GroupShare(torch.autograd.Function):
    """One rank's share of the loss over all ranks' rows; the collectives of both passes are all here."""

    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        text: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        image_ids: Tensor | None,
        text_ids: Tensor | None,
        mode: str,
        columns: bool,
        group: dist.ProcessGroup,
    ) -> Tensor:
        exchange = RowExchange(image, text, group)
        offset, total = exchange.text_offset, sum(exchange.image_counts)
        all_text = exchange.gather_text(text)
        all_bias = None if bias is None else exchange.gather_text(bias)
        ids = None
        if image_ids is not None and text_ids is not None:
            all_image_ids = exchange.gather_images(image_ids) if columns else image_ids
            ids = (image_ids, all_image_ids, exchange.gather_text(text_ids))
        inputs = (
            *(image, all_text, scale, all_bias),
            *((None, None) if ids is None else (ids[0], ids[2])),
            *positive_weights(image, all_text, ids, offset, mode, columns),
        )
        row_lse, col_lse, target = logit_statistics(*inputs, offset, mode, columns)
        terms = row_lse - target
        if columns:
            col_lse = exchange.logsumexp(col_lse)
            terms = terms + col_lse[offset : offset + image.shape[0]]
        # world / B instead of 1 / B_local: the mean over ranks is then the mean over pairs, however they are spread.
        ctx.factor = exchange.world_size / (total * (2 if columns else 1))
        ctx.exchange, ctx.offset, ctx.mode = exchange, offset, mode
        ctx.save_for_backward(*inputs, row_lse, col_lse)
        return terms.sum() * ctx.factor

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        image, all_text, scale, all_bias, *_, row_lse, col_lse = ctx.saved_tensors
        needs_image, needs_text, needs_scale, needs_bias = ctx.needs_input_grad[:4]
        grad = grad.to(row_lse.dtype) * ctx.factor
        image_out, text_out, bias_out = logit_gradients(
            *ctx.saved_tensors,
            *(grad.expand(row_lse.shape), grad.expand(col_lse.shape), (-grad).expand(row_lse.shape)),
            *(ctx.offset, ctx.mode, needs_text),
        )
        factor = scale.to(image_out.dtype).reshape(())
        return (
            (image_out * factor).to(image.dtype) if needs_image else None,
            ctx.exchange.reduce_scatter_text(text_out * factor).to(all_text.dtype) if needs_text else None,
            scale_gradient(image, image_out, scale) if needs_scale else None,
            ctx.exchange.reduce_scatter_text(bias_out).to(all_bias.dtype) if needs_bias else None,
            *(None,) * 5,
        )


def group_share(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    mode: str,
    columns: bool,
    group: dist.ProcessGroup,
) -> Tensor:
    """This rank's share of the loss; mode as in contrastive_statistics, columns: whether both sides count.

    Value and gradients are scaled so that their mean over ranks is that of one process with all rows. The first of its
    collectives reads the ranks' row counts on the host, which waits for the device.
    """
    share: Tensor = _GroupShare.apply(image, text, scale, bias, image_ids, text_ids, mode, columns, group)
    return share
