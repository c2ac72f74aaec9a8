"""Over gloo ranks with uneven batches, the mean of the shares and of their gradients is what one process computes."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from eclip.kernels.contrastive import contrastive_loss, ops, ranks, sigmoid_loss
from eclip.kernels.contrastive.problem import Logits, find_matches, magnitudes, safe_shift
from tests.helpers import run_torchrun
from tests.kernels.contrastive.checks import make_arguments, on

WORKER = '''
import gc
import itertools

import torch
import torch.distributed as dist

from eclip.kernels import launch
from eclip.kernels.contrastive import contrastive_loss, contrastive_loss_reference, plain, ranks
from eclip.kernels.contrastive import sigmoid_loss, sigmoid_loss_reference
from tests.kernels import bf16_interp

plain._TILE = 4  # several tiles a rank
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2}


def check(group, counts, sides, positives, dtype, bias=False, extra=0, given=False, scale=3.0):
    """Every rank knows all rows, computes the reference alone and passes its own rows to the group.

    given: the ranks' rows are named instead of exchanged. extra: so many further keys a rank.
    """
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    generator = torch.Generator().manual_seed(sum(counts))
    total, dim = sum(counts), 6
    image = torch.randn(total, dim, generator=generator, dtype=torch.float64)
    text = torch.randn(total + world * extra, dim, generator=generator, dtype=torch.float64)
    # Norms grow from rank to rank.
    image, text = (torch.linspace(0.3, 0.7, len(x))[:, None] * x for x in (image, text))
    image, text = (x.to(dtype).double() for x in (image, text))
    column_bias = torch.randn(len(text), generator=generator, dtype=torch.float64)
    image_ids = torch.randint(4, (total,), generator=generator)
    text_ids = torch.randint(4, (len(text),), generator=generator)
    # One process: pairs first, then the further keys of every rank; a rank: its pairs, then its further keys.
    first = sum(counts[:rank])
    own = torch.arange(first, first + counts[rank])
    keys = torch.cat([own, total + rank * extra + torch.arange(extra)])

    def run(softmax, sigmoid, rows, columns, dtype, **grouped):
        leaves = [image[rows], text[columns], torch.tensor([scale]), torch.tensor(-1.0)]
        if sides != "sigmoid":
            leaves[3] = column_bias[columns]
        number = torch.promote_types(dtype, torch.float32)
        leaves = [x.to(t).clone().requires_grad_() for x, t in zip(leaves, (dtype, dtype, number, number))]
        options = {} if positives == "diagonal" else {"image_ids": image_ids[rows], "text_ids": text_ids[columns]}
        options |= {"positives": positives, **grouped}
        if sides == "sigmoid":
            value = sigmoid(*leaves, **options)
        else:
            value = softmax(*leaves[:3], sides=sides, bias=leaves[3] if bias else None, **options)
        value.backward()
        return value.detach(), [x.grad for x in leaves]

    references = contrastive_loss_reference, sigmoid_loss_reference
    exact, expected = run(*references, torch.arange(total), torch.arange(len(text)), torch.float64)
    rows_per_rank = counts if given else None
    share, found = run(contrastive_loss, sigmoid_loss, own, keys, dtype, group=group, rows_per_rank=rows_per_rank)

    def close(ours, reference):
        tolerance = TOLERANCE[dtype] * max(1, reference.abs().max()) if reference.numel() else 0
        torch.testing.assert_close(ours.double(), reference.double(), rtol=0, atol=tolerance)

    means = torch.stack([x.double().sum() for x in (share, found[2], found[3] if sides == "sigmoid" else share)])
    dist.all_reduce(means, group=group)
    close(means[0] / world, exact)
    close(means[1] / world, expected[2][0])
    if sides == "sigmoid":
        close(means[2] / world, expected[3])
    close(found[0] / world, expected[0][own])
    if sides == "rows":
        assert found[1] is None and expected[1] is None
    else:
        close(found[1] / world, expected[1][keys])
    if bias:
        close(found[3] / world, expected[3][keys])


def check_all(group):
    world = dist.get_world_size(group)
    check(group, [3, 3, 3][:world], "both", "diagonal", torch.float32)
    for counts in ([5, 2, 4], [0, 7, 1], [3, 0, 2]):
        counts = counts[:world]
        for positives, sides in itertools.product(("diagonal", "soft", "mask"), ("both", "rows")):
            check(group, counts, sides, positives, torch.float32, given=positives == "soft")
            check(group, counts, sides, positives, torch.float64, bias=True, extra=2 if sides == "rows" else 0)
        for positives in ("diagonal", "all", "mask"):
            for dtype in (torch.float32, torch.float64):
                check(group, counts, "sigmoid", positives, dtype, given=dtype == torch.float64)
    for sides, positives in (("both", "soft"), ("sigmoid", "all")):
        check(group, [5, 2, 4][:world], sides, positives, torch.bfloat16)


def check_kernels(group):
    """The Triton kernels interpreted: one shift for the logits of all ranks, blocks of columns, kept logits."""
    bf16_interp.install()
    launch.interpret_on_cpu = True
    room, kept = ranks._new_kept, []
    ranks._new_kept = lambda *arguments: kept.append(room(*arguments)) or kept[-1]
    check(group, [3, 5, 0], "both", "soft", torch.bfloat16, scale=100.0)
    check(group, [3, 3, 1], "rows", "diagonal", torch.bfloat16, extra=253, scale=10.0)
    check(group, [3, 0, 5], "rows", "mask", torch.bfloat16, bias=True, extra=1)
    check(group, [3, 5, 0], "sigmoid", "all", torch.float32, scale=30.0)
    if launch.launches_triton(torch.empty(0)):
        # Whole tiles, 256 texts, are what the first two ranks have in the second case.
        assert [x is not None for x in kept[1:]] == [dist.get_rank(group) < 2, False, False], kept
    launch.interpret_on_cpu = False
    ranks._new_kept = room


def draw(batch, dim, dtype=torch.float32):
    """Features, others on every rank."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    return [x.requires_grad_() for x in torch.randn(2, batch, dim, generator=generator).to(dtype).unbind()]


def check_repeats(group):
    values = []
    for _ in range(2):
        image, text = draw(9 + dist.get_rank(), 16)
        loss = contrastive_loss(image, text, 20.0, group=group)
        loss.backward()
        values.append([loss.detach(), image.grad, text.grad])
    assert all(torch.equal(a, b) for a, b in zip(*values))


def check_autocast(group):
    """One tower is rounded before it travels; without gradients the value is the same."""
    image, text = draw(4, 8)
    options = {"group": group, "rows_per_rank": [4] * dist.get_world_size(group)}
    expected = contrastive_loss(image.bfloat16(), text.bfloat16(), 20.0, **options)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(contrastive_loss(image, text, 20.0, **options), expected)
        with torch.no_grad():
            assert torch.equal(contrastive_loss(image, text, 20.0, **options), expected)


def check_traffic_and_order(group):
    """Bytes that a rank receives, and that its own block is computed while the texts of the others arrive."""
    received, events = [], []

    def counted(module, name):
        real = getattr(module, name)

        def collective(out, *args, **options):
            received.append(out.numel() * out.element_size())
            if out.ndim == 2:
                events.append(name)
            return real(out, *args, **options)

        setattr(module, name, collective)

    counted(ranks, "_all_gather")
    counted(dist, "all_to_all_single")
    counted(dist, "all_reduce")
    statistics, wait = ranks.pair_statistics, ranks.Arriving.wait

    def watched_statistics(logits, kept):
        events.append(f"statistics {len(logits.text)}")
        return statistics(logits, kept)

    def watched_wait(self):
        events.append("wait")
        return wait(self)

    ranks.pair_statistics, ranks.Arriving.wait = watched_statistics, watched_wait
    world, batch, dim = dist.get_world_size(group), 8, 256
    before = batch * dist.get_rank(group)
    for given in (None, [batch] * world):
        received.clear()
        events.clear()
        image, text = draw(batch, dim, torch.bfloat16)
        contrastive_loss(image, text, 3.0, group=group, rows_per_rank=given).backward()
        tower = world * batch * dim * 2
        both_towers_and_gradients = 4 * tower
        *small, first, second = sorted(received)
        assert first == second == tower and first + second == both_towers_and_gradients / 2, received
        # Row counts, three magnitudes, maxima and sums of the columns.
        assert len(small) == (4 if given is None else 3) and sum(small) <= 24 * world + 12 + 8 * world * batch
        assert events == [
            *("_all_gather", f"statistics {batch}", "wait"),
            *(f"statistics {before}", f"statistics {(world - 1) * batch - before}", "all_to_all_single"),
        ], events


def check_errors(group):
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    ones, wide = torch.ones(2, 3), torch.ones(2, 3 + rank)
    for features, given, message in (
        (wide, None, "equally wide"),
        (ones[:0], None, "no rank passed a pair"),
        (ones[:0], [0] * world, "no rank passed a pair"),
        (ones, [2] * (world + 1), f"each of the group's {world} ranks"),
        (ones, [3] * world, f"says 3 for rank {rank}, which has 2 images and 2 texts"),
    ):
        try:
            contrastive_loss(features, features, 3.0, group=group, rows_per_rank=given)
        except ValueError as error:
            assert message in str(error), error
        else:
            raise AssertionError(message)


def main():
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    # In the group of two, no rank has the number it has among all.
    for group in (dist.new_group([1, 2]), dist.group.WORLD):
        if dist.get_rank(group) >= 0:
            check_all(group)
            check_repeats(group)
            check_autocast(group)
            check_errors(group)
    check_kernels(dist.group.WORLD)
    check_traffic_and_order(dist.group.WORLD)
    print("equal")


main()
gc.collect()
dist.destroy_process_group()
'''


def test_ranks_equal_one_process() -> None:
    """Three ranks, and two of them in a group of their own."""
    assert run_torchrun(WORKER, ranks=3, timeout=240, env={"TRITON_INTERPRET": "1"}).count("equal") == 3


def test_group_of_one_rank_is_the_plain_loss() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        image, text = torch.randn(2, 5, 8)
        group = {"group": dist.group.WORLD, "rows_per_rank": [5]}
        assert contrastive_loss(image, text, 2.0, **group) == contrastive_loss(image, text, 2.0)
        assert sigmoid_loss(image, text, 2.0, -1.0, **group) == sigmoid_loss(image, text, 2.0, -1.0)
        with pytest.raises(ValueError, match="no pair"):
            contrastive_loss(image[:0], text[:0], 2.0, group=dist.group.WORLD)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("device, backend", [("cpu", "gloo"), pytest.param("cuda", "nccl", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("keep_bytes", [0, 2**20])
def test_collectives_of_one_rank(device: str, backend: str, keep_bytes: int) -> None:
    """All that several ranks do, by one: a GPU by itself can test NCCL no further."""
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        features = torch.randn(2, 256, 64, device=device, dtype=torch.bfloat16) / 8
        found, expected = [], []
        for losses in (found, expected):
            image, text = (x.clone().requires_grad_() for x in features)
            scale = torch.tensor(20.0, device=device, requires_grad=True)
            if losses is found:
                rest = (None, None, None, "both", "diagonal", dist.group.WORLD, [256], keep_bytes)
                loss = ranks._GroupShare.apply(image, text, scale, *rest)
            else:
                loss = contrastive_loss(image, text, scale, keep_bytes=keep_bytes)
            loss.backward()
            losses += [loss.detach(), image.grad, text.grad, scale.grad]
        for ours, plain in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-2, atol=1e-5)
    finally:
        dist.destroy_process_group()


def test_known_rows_must_be_this_ranks() -> None:
    image, text = torch.randn(2, 5, 8)
    assert contrastive_loss(image, text, 2.0, rows_per_rank=(5,)) == contrastive_loss(image, text, 2.0)
    with pytest.raises(ValueError, match=r"rows_per_rank=\(4,\) says 4 for rank 0, which has 5 images and 5 texts"):
        contrastive_loss(image, text, 2.0, rows_per_rank=(4,))
    with pytest.raises(ValueError, match="5 images and 6 texts"):
        contrastive_loss(image, torch.randn(6, 8), 2.0, sides="rows", rows_per_rank=(5,))


@pytest.mark.parametrize("positives", ["diagonal", "all", "mask"])
@pytest.mark.parametrize("sides", ["both", "rows", "sigmoid"])
def test_blocks_of_columns_make_up_the_whole(path: torch.device, sides: str, positives: str) -> None:
    """What a rank does while texts arrive: its own columns, then those before and after, where no row has its pair."""
    arguments = on(path, make_arguments(20, 16, positives, keys=50, bias=True))
    image, text, scale, bias = (arguments[n] for n in ("image_features", "text_features", "logit_scale", "bias"))
    matches = (None, None)
    if positives != "diagonal":
        matches = find_matches(arguments["image_ids"], arguments["text_ids"], positives)
    shift = safe_shift(magnitudes(image, text, bias), scale, sides)
    weights = torch.rand(20, device=path), torch.rand(50, device=path)
    own = slice(17, 37)
    logits = Logits(image, text, scale, bias, *matches, *weights, shift, own.start, sides, positives)
    whole = ops.pair_statistics(logits, None)

    class Arrived:
        def wait(self) -> Tensor:
            return text

    parts = ranks._statistics(logits, text[own], Arrived(), own, None)
    for found, expected in zip(parts, whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_ranks_keep_only_whole_tiles(device: torch.device) -> None:
    """Else a block of columns would write into its neighbour."""
    image = torch.zeros(10, 64, dtype=torch.bfloat16, device=device)
    for start, stop, keeps in ((0, 256, True), (256, 512, True), (200, 456, False), (256, 500, False)):
        memory = ranks._new_kept(image, 700, slice(start, stop), "both", 2**20)
        assert (memory is not None) == keeps
