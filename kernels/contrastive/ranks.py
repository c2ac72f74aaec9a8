"""The contrastive losses over the pairs of all ranks of a group: what is exchanged, and each rank's share.

Each rank holds its rows of the matrix of logits, S_l = scale I_l T_all^T. Its row sums are its own; column sums are
all-reduced; dI_l = scale G_l T_all is complete; dT = scale (sum over ranks of G_l^T I_l) goes to each text's rank and
is summed there in fp32. So ONE tower moves once each way, in the features' dtype: B D numbers in, B D out, where
gathering both towers needs twice that.

A rank needs none of the gather for the logits of its own texts: these are computed while the others' texts arrive.
That is 2 R^2 D FLOP against 2 (ranks - 1) R D bytes in bf16: at 790 TFLOP/s and 400 GB/s the gather is hidden from
about R = 2000 (ranks - 1) on, below that a part of it. On a GPU the host waits for nothing but the row counts, and not
for them where the caller knows them.

NCCL and gloo gather only equal pieces: rows are padded to the longest rank's count, and the padding is dropped after.

Letters: R images and C texts of this rank, B pairs of all ranks, D features.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..launch import accumulate_dtype
from .ops import loss_terms, num_terms, pair_gradients, pair_statistics
from .options import keeps_logits, padded_shape
from .problem import Logits, Wanted, find_matches, magnitudes, positive_weights, safe_shift

# torch 2.13 renamed it and warns at every call of the old name; 2.11 has only that.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def rank_share(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    sides: str,
    positives: str,
    group: dist.ProcessGroup,
    rows_per_rank: Sequence[int] | None,
    keep_bytes: int = 0,
) -> Tensor:
    """This rank's share of the `pair_loss` of all ranks' rows; collective.

    A share and its gradients are scaled so that their mean over ranks is that of one process with all rows.
    rows_per_rank: as in `contrastive_loss`. keep_bytes: as in `pair_loss`.
    """
    share: Tensor = _GroupShare.apply(
        *(image, text, scale, bias, image_ids, text_ids, sides, positives, group, rows_per_rank, keep_bytes)
    )
    return share


class RowExchange:
    """Where every rank's rows lie in the concatenation over ranks, and the collectives that move them.

    rows_per_rank: the counts of images and of texts; None: they are exchanged, so constructing it is a collective, and
    ValueError is raised on every rank when the ranks disagree on D. Raises it also if no rank has a pair.
    """

    def __init__(
        self, image: Tensor, text: Tensor, group: dist.ProcessGroup, rows_per_rank: Sequence[int] | None
    ) -> None:
        self.group = group
        self.world_size = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        if rows_per_rank is None:
            self.image_counts, self.text_counts = self._exchange_counts(image, text)
        else:
            self.image_counts = self.text_counts = list(rows_per_rank)
        if not sum(self.image_counts):
            raise ValueError("no rank passed a pair; pass at least one")
        self.own_images, self.own_texts = (self._own(counts) for counts in (self.image_counts, self.text_counts))
        """This rank's rows and columns among those of all ranks."""

    def _own(self, counts: list[int]) -> slice:
        before = sum(counts[: self.rank])
        return slice(before, before + counts[self.rank])

    def _exchange_counts(self, image: Tensor, text: Tensor) -> tuple[list[int], list[int]]:
        own = torch.tensor([image.shape[0], text.shape[0], text.shape[1]], device=image.device)
        every = own.new_empty(self.world_size * 3)
        _all_gather(every, own, group=self.group)
        image_counts, text_counts, widths = map(list, zip(*every.view(-1, 3).tolist(), strict=True))
        if len(set(widths)) > 1:
            raise ValueError(
                f"features are {widths} wide on ranks 0 to {self.world_size - 1}; they must be equally wide"
            )
        return image_counts, text_counts

    def start_gather(self, rows: Tensor, counts: list[int]) -> "Arriving":
        """(n, ...) of each rank -> the concatenation over ranks, on its way. counts: n of every rank."""
        return Arriving(rows, counts, self.group)

    def gather(self, rows: Tensor, counts: list[int]) -> Tensor:
        return self.start_gather(rows, counts).wait()

    def largest(self, values: Tensor) -> Tensor:
        """The maximum over ranks, in place."""
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self.group)
        return values

    def logsumexp(self, partial: Tensor) -> Tensor:
        """log of the sum over ranks of exp(partial); partial may be -inf on some ranks, not on all."""
        largest = self.largest(partial.clone())
        total = (partial - largest).exp()
        dist.all_reduce(total, group=self.group)
        return largest + total.log()

    def sum_texts(self, partial: Tensor) -> Tensor:
        """(texts of all ranks, ...) on each rank -> this rank's rows of their sum, in fp32 (fp64 for fp64).

        A reduce-scatter that rounds once: partial sums travel in their own dtype and are added up in fp32, in an order
        that does not depend on the network.
        """
        own = self.text_counts[self.rank]
        pieces = partial.new_empty((self.world_size * own, *partial.shape[1:]))
        dist.all_to_all_single(pieces, partial, [own] * self.world_size, self.text_counts, group=self.group)
        pieces = pieces.view(self.world_size, own, *partial.shape[1:])
        return pieces.sum(0, dtype=accumulate_dtype(partial.dtype))


class Arriving:
    """Rows of all ranks on their way to this one."""

    def __init__(self, rows: Tensor, counts: list[int], group: dist.ProcessGroup) -> None:
        self.rows = rows.new_empty((sum(counts), *rows.shape[1:]))
        """Filled by `wait`."""
        self._counts, self._longest = counts, max(counts)
        padding = rows.new_zeros((self._longest - rows.shape[0], *rows.shape[1:]))
        self._sent = torch.cat([rows, padding]) if len(padding) else rows.contiguous()
        self._received = self.rows
        if min(counts) != self._longest:
            self._received = rows.new_empty((len(counts) * self._longest, *rows.shape[1:]))
        self._work = _all_gather(self._received, self._sent, group=group, async_op=True)

    def wait(self) -> Tensor:
        """On a GPU the current stream waits, the host does not."""
        self._work.wait()
        if self._received is not self.rows:
            pieces = self._received.split(self._longest)
            torch.cat([piece[:count] for piece, count in zip(pieces, self._counts, strict=True)], out=self.rows)
        return self.rows


def _new_kept(image: Tensor, num_cols: int, own: slice, sides: str, keep_bytes: int) -> Tensor | None:
    """Memory for exp(s) against all texts, where it should be kept; the blocks of `_statistics` write slices of it.

    Kernels write whole tiles. Unless the own columns begin and end with one, a block would write into its neighbour:
    such a rank keeps nothing and computes logits again. With local batches that are multiples of 256 none does.
    """
    whole = all(padded_shape(0, edge)[1] == edge for edge in (own.start, own.stop))
    if not whole or not keeps_logits(image, num_cols, sides, keep_bytes):
        return None
    return image.new_empty(padded_shape(image.shape[0], num_cols), dtype=torch.bfloat16)


def _statistics(
    logits: Logits, text: Tensor, arriving: Arriving, own: slice, kept: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`pair_statistics` of logits whose texts are on their way, all but `text` at `own`, which is here.

    Three blocks of columns, own first. With one shift for all, their exp(s - shift) are as of one call.
    """

    def block(texts: Tensor, columns: slice, offset: int) -> tuple[Tensor, Tensor, Tensor]:
        memory = None if kept is None else kept[:, columns]
        return pair_statistics(logits.of_columns(columns, texts, offset), memory)

    here = block(text, own, 0)
    all_text = arriving.wait()
    # Offset -R: row i's text is column i - R < 0, so none of the pairs is in these blocks.
    before, after = (
        block(all_text[columns], columns, -logits.image.shape[0])
        for columns in (slice(0, own.start), slice(own.stop, len(all_text)))
    )
    row_stats, col_stats, targets = zip(before, here, after, strict=True)
    stacked = torch.stack(row_stats)
    row_stat = stacked.sum(0) if logits.sides == "sigmoid" else stacked.logsumexp(0)
    return row_stat, torch.cat(col_stats), torch.stack(targets).sum(0)


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
        sides: str,
        positives: str,
        group: dist.ProcessGroup,
        rows_per_rank: Sequence[int] | None,
        keep_bytes: int,
    ) -> Tensor:
        exchange = RowExchange(image, text, group, rows_per_rank)
        own, texts = exchange.own_texts, exchange.text_counts
        shift = safe_shift(exchange.largest(magnitudes(image, text, bias)), scale, sides)
        all_bias = None if bias is None else exchange.gather(bias, texts)
        # Where columns share their target, they count the rows of all ranks; else this rank's are enough.
        all_rows = sides == "both" and positives == "all"
        ids = None
        if image_ids is not None and text_ids is not None:
            row_ids = exchange.gather(image_ids, exchange.image_counts) if all_rows else image_ids
            ids = row_ids, exchange.gather(text_ids, texts)
        arriving = exchange.start_gather(text, texts)
        matches = None if ids is None else find_matches(*ids, positives)
        row_weight, col_weight = positive_weights(
            image, sum(texts), matches, 0 if all_rows else own.start, sides, positives
        )
        if all_rows and matches is not None:
            row_weight, matches = row_weight[exchange.own_images], matches.of_rows(exchange.own_images)
        row_match, col_match = matches or (None, None)
        logits = Logits(
            *(image, arriving.rows, scale, all_bias, row_match, col_match, row_weight, col_weight, shift),
            *(own.start, sides, positives),
        )
        kept = _new_kept(image, sum(texts), own, sides, keep_bytes)
        row_stat, col_stat, target = _statistics(logits, text, arriving, own, kept)
        if sides == "both":
            col_stat = exchange.logsumexp(col_stat)
        terms = loss_terms(row_stat, col_stat[own], target, sides)
        # world / B instead of 1 / B_local: the mean over ranks is then the mean over pairs, however they are spread.
        ctx.factor = exchange.world_size / num_terms(sum(exchange.image_counts), sides)
        ctx.exchange, ctx.sides, ctx.positives = exchange, sides, positives
        ctx.save_for_backward(*logits[:8], row_stat, col_stat, shift, kept)
        return terms.sum() * ctx.factor

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _, text, scale, bias, *_ = ctx.saved_tensors
        wanted = Wanted(*ctx.needs_input_grad[:4])
        image_grad, text_grad, scale_grad, bias_grad = pair_gradients(
            *(*ctx.saved_tensors, grad * ctx.factor, ctx.exchange.own_texts.start, ctx.sides, ctx.positives, *wanted)
        )
        return (
            image_grad if wanted.image else None,
            ctx.exchange.sum_texts(text_grad).to(text.dtype) if wanted.text else None,
            scale_grad.to(scale.dtype).reshape(scale.shape) if wanted.scale else None,
            ctx.exchange.sum_texts(bias_grad).to(bias.dtype) if wanted.bias else None,
            *(None,) * 7,
        )
