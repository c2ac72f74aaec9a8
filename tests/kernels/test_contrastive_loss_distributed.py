"""Over gloo ranks with uneven batches, the mean of the shares and of their gradients is what one process computes."""

import pytest
import torch
import torch.distributed as dist

from eclip.kernels.contrastive_loss import contrastive_loss
from tests.helpers import run_torchrun

WORKER = '''
import gc
import itertools

import torch
import torch.distributed as dist

from eclip.kernels import contrastive_distributed, contrastive_statistics
from eclip.kernels.contrastive_loss import contrastive_loss, contrastive_loss_reference

contrastive_statistics._TILE["cpu"] = 4  # several tiles a rank


def leaf(x):
    return x.clone().requires_grad_()


def check(counts, positives, sides, bias, extra, dtype):
    """Every rank knows all rows, computes the reference alone and passes its own rows to the group."""
    rank, world = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(sum(counts))
    total, dim = sum(counts), 6
    image = torch.randn(total, dim, generator=generator, dtype=torch.float64)
    text = torch.randn(total + world * extra, dim, generator=generator, dtype=torch.float64)
    column_bias = torch.randn(len(text), generator=generator, dtype=torch.float64)
    image_ids = torch.randint(4, (total,), generator=generator)
    text_ids = torch.randint(4, (len(text),), generator=generator)
    # One process: pairs first, then the further keys of every rank; a rank: its pairs, then its further keys.
    first = sum(counts[:rank])
    own = torch.arange(first, first + counts[rank])
    keys = torch.cat([own, total + rank * extra + torch.arange(extra)])

    def run(loss, rows, columns, dtype, **group):
        leaves = [leaf(x.to(dtype)) for x in (image[rows], text[columns], torch.tensor([3.0]), column_bias[columns])]
        ids = {} if positives == "diagonal" else {"image_ids": image_ids[rows], "text_ids": text_ids[columns]}
        options = {"positives": positives, "sides": sides, "bias": leaves[3] if bias else None, **ids, **group}
        value = loss(*leaves[:3], **options)
        value.backward()
        return value.detach(), [x.grad for x in leaves]

    exact, (d_image, d_text, d_scale, d_bias) = run(
        contrastive_loss_reference, torch.arange(total), torch.arange(len(text)), torch.float64
    )
    share, found = run(contrastive_loss, own, keys, dtype, group=dist.group.WORLD)
    means = torch.stack([share.double(), found[2].double()[0]])
    dist.all_reduce(means)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]
    close = lambda a, b: torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)
    if dtype != torch.bfloat16:
        close(means / world, torch.stack([exact, d_scale[0]]))
    close(found[0] / world, d_image[own])
    if sides == "both":
        close(found[1] / world, d_text[keys])
    else:
        assert found[1] is None and d_text is None
    if bias:
        close(found[3] / world, d_bias[keys])


def main():
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    world = dist.get_world_size()
    check([3, 3, 3][:world], "diagonal", "both", False, 0, torch.float32)
    for counts in ([5, 2, 4], [0, 7, 1]):
        for positives, sides in itertools.product(("diagonal", "soft", "mask"), ("both", "rows")):
            for bias, dtype in ((False, torch.float32), (True, torch.float64)):
                check(counts[:world], positives, sides, bias, 2 if sides == "rows" and bias else 0, dtype)
    check([5, 2, 4][:world], "soft", "both", False, 0, torch.bfloat16)

    # Half of what gathering both towers moves: one gather and one reduce-scatter of (B, D), the rest is O(B).
    moved = []
    for name in ("_all_gather", "_reduce_scatter"):
        def counted(out, rows, group, real=getattr(contrastive_distributed, name)):
            moved.append(max(out.numel(), rows.numel()))
            real(out, rows, group=group)
        setattr(contrastive_distributed, name, counted)
    batch, dim = 8, 32
    image, text = torch.randn(2, batch, dim).requires_grad_().unbind()
    contrastive_loss(image, text, 3.0, group=dist.group.WORLD).backward()
    assert sorted(moved)[-2:] == [world * batch * dim] * 2 and sum(sorted(moved)[:-2]) <= 4 * world * batch, moved

    for images, texts, message in (
        (torch.ones(2, 3 + dist.get_rank()), torch.ones(2, 3 + dist.get_rank()), "equally wide"),
        (torch.ones(0, 3), torch.ones(0, 3), "no rank passed a pair"),
    ):
        try:
            contrastive_loss(images, texts, 3.0, group=dist.group.WORLD)
        except ValueError as error:
            assert message in str(error), error
        else:
            raise AssertionError(message)
    print("equal")


main()
gc.collect()
dist.destroy_process_group()
'''


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_equal_one_process(ranks: int) -> None:
    assert run_torchrun(WORKER, ranks=ranks, timeout=240).count("equal") == ranks


def test_group_of_one_rank_is_the_plain_loss() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        image, text = torch.randn(2, 5, 8)
        assert contrastive_loss(image, text, 2.0, group=dist.group.WORLD) == contrastive_loss(image, text, 2.0)
    finally:
        dist.destroy_process_group()
