"""What every kernel file shares: fp32 products that keep all their bits while torch's switches allow fewer."""

import functools
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from eclip.kernels.contrastive import contrastive_loss, triton_backward
from eclip.kernels.launch import exact_products
from tests.kernels.contrastive.checks import make_arguments, value_and_grads

GPU, CPU = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
ON_GPU = SimpleNamespace(is_cuda=True, dtype=torch.float32)  # as much of a tensor as is looked at


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    yield
    torch.backends.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")


def switches() -> tuple[str, ...]:
    return GPU.fp32_precision, CPU.fp32_precision, torch.backends.fp32_precision


def set_old(value: str) -> None:
    torch.set_float32_matmul_precision(value)


def set_allow() -> None:
    GPU.allow_tf32 = True


def set_new() -> None:
    GPU.fp32_precision = CPU.fp32_precision = "tf32"


def set_for_all() -> None:
    GPU.fp32_precision = CPU.fp32_precision = "none"
    torch.backends.fp32_precision = "tf32"


WAYS = [functools.partial(set_old, "high"), functools.partial(set_old, "medium"), set_allow, set_new, set_for_all]


@pytest.mark.parametrize("turn_on", [functools.partial(set_old, "highest"), *WAYS], ids=range(1 + len(WAYS)))
@pytest.mark.parametrize("x", [ON_GPU, torch.ones(1), torch.ones(1, dtype=torch.bfloat16)], ids=["gpu", "cpu", "bf16"])
def test_switches_are_off_inside_and_as_before_after(turn_on: Any, x: Any) -> None:
    """By torch's older interface and its newer one, for one operation and for all; after an error too."""
    turn_on()
    before, watched = switches(), GPU if x.is_cuda else CPU
    seen = []

    def fail_inside() -> None:
        with exact_products(x):
            seen.append(watched.fp32_precision)
            with exact_products(x):  # as in a backward that calls a forward again
                seen.append(watched.fp32_precision)
            seen.append(watched.fp32_precision)
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert len(seen) == 3 and set(seen) <= {"none", "ieee"}
    assert switches() == before


def test_the_older_interface_reads_what_was_set_with_it() -> None:
    """Torch refuses to answer where its two interfaces disagree."""
    for precision in ("highest", "high", "medium"):
        torch.set_float32_matmul_precision(precision)
        with exact_products(ON_GPU):
            pass
        assert torch.get_float32_matmul_precision() == precision
        assert GPU.allow_tf32 == (precision != "highest")


def test_a_switch_for_all_goes_on_ruling() -> None:
    set_for_all()
    with exact_products(ON_GPU):
        pass
    torch.backends.fp32_precision = "ieee"
    assert GPU.fp32_precision == "ieee"


@pytest.mark.parametrize(
    "x",
    [SimpleNamespace(is_cuda=True, dtype=torch.bfloat16), torch.ones(1, dtype=torch.float64)],
    ids=["bf16 on a GPU", "fp64"],
)
def test_switches_that_do_not_matter_are_left_alone(x: Any) -> None:
    set_new()
    with exact_products(x):
        assert switches()[:2] == ("tf32", "tf32")


def test_threads_take_turns() -> None:
    """Else the first one out would turn the switch on under the others."""
    torch.set_float32_matmul_precision("high")
    inside, go_on, seen = threading.Event(), threading.Event(), []

    def first() -> None:
        with exact_products(ON_GPU):
            inside.set()
            go_on.wait(60)

    def second() -> None:
        with exact_products(ON_GPU):
            seen.append(GPU.fp32_precision)

    threads = [threading.Thread(target=run) for run in (first, second)]
    threads[0].start()
    assert inside.wait(60)
    threads[1].start()
    go_on.set()
    for thread in threads:
        thread.join(60)
    assert seen == ["ieee"]
    assert GPU.fp32_precision == "tf32"


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_losses_do_not_depend_on_the_switches(precision: str) -> None:
    """bf16 products would miss logits of 100 by 0.5."""
    arguments = make_arguments(64, 64, scale=100.0)
    expected = value_and_grads(contrastive_loss, arguments)
    torch.set_float32_matmul_precision(precision)
    for name, value in value_and_grads(contrastive_loss, arguments).items():
        assert torch.equal(value, expected[name]), name


def test_products_of_kernels_are_launched_with_the_switches_off(
    interpreter: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradients' GEMMs, which are torch's, after kernels that are ours."""
    accumulate, seen = triton_backward._accumulate, []

    def watched(*operands: Any) -> None:
        seen.append(CPU.fp32_precision)
        accumulate(*operands)

    monkeypatch.setattr(triton_backward, "_accumulate", watched)
    torch.set_float32_matmul_precision("high")
    value_and_grads(contrastive_loss, make_arguments(5, 8))
    assert seen == ["ieee", "ieee"]


def test_compiled_losses_find_the_switches_as_they_were() -> None:
    torch.set_float32_matmul_precision("high")
    arguments = make_arguments(6, 8)
    compiled = torch.compile(contrastive_loss, fullgraph=True, backend="aot_eager")
    value_and_grads(compiled, arguments)
    assert torch.get_float32_matmul_precision() == "high"
