"""What arrives while the model is busy is asked together; no client's fault, or leaving, is another one's."""

import threading
from collections.abc import Iterator, Sequence

import pytest

from eclip.serve.batching import Batcher
from eclip.serve.limits import Refusal


class Model:
    """Answers n with n * n, when it may; -1 is an error of the question's."""

    def __init__(self) -> None:
        self.may, self.entered = threading.Event(), threading.Event()
        self.seen: list[list[int]] = []

    def answer(self, questions: Sequence[int]) -> list[int]:
        self.seen.append(list(questions))
        self.entered.set()
        assert self.may.wait(10)
        if -1 in questions:
            raise ValueError("minus one")
        return [n * n for n in questions]


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.fixture
def batcher(model: Model) -> Iterator[Batcher[int, int]]:
    made = Batcher(model.answer, most=4, pending=6)
    yield made
    model.may.set()
    made.close()


def occupy(model: Model, batcher: Batcher[int, int]) -> None:
    """The model is at work on 0."""
    batcher.submit(0)
    assert model.entered.wait(10)


def test_a_lone_question_waits_for_nobody_and_the_others_are_asked_together(
    model: Model, batcher: Batcher[int, int]
) -> None:
    occupy(model, batcher)
    futures = [batcher.submit(n) for n in range(1, 7)]
    model.may.set()
    assert [future.result(10) for future in futures] == [1, 4, 9, 16, 25, 36]
    assert model.seen == [[0], [1, 2, 3, 4], [5, 6]]
    assert list(batcher.batches) == [1, 4, 2]


def test_too_many_are_refused_with_a_time_to_come_back(model: Model, batcher: Batcher[int, int]) -> None:
    occupy(model, batcher)
    futures = [batcher.submit(n) for n in range(6)]
    with pytest.raises(Refusal, match="busy: 6 questions wait") as refused:
        batcher.submit(7)
    assert refused.value.status == 503 and refused.value.headers == {"Retry-After": "1"}
    model.may.set()
    assert futures[5].result(10) == 25
    assert batcher.submit(7).result(10) == 49


def test_a_questions_error_is_its_own(model: Model, batcher: Batcher[int, int]) -> None:
    occupy(model, batcher)
    good, bad, also_good = batcher.submit(2), batcher.submit(-1), batcher.submit(3)
    model.may.set()
    assert (good.result(10), also_good.result(10)) == (4, 9)
    with pytest.raises(ValueError, match="minus one"):
        bad.result(10)


def test_who_left_is_not_answered(model: Model, batcher: Batcher[int, int]) -> None:
    occupy(model, batcher)
    left, stays = batcher.submit(2), batcher.submit(3)
    assert left.cancel()
    model.may.set()
    assert stays.result(10) == 9
    assert model.seen == [[0], [3]]


def test_other_work_keeps_its_turn(model: Model, batcher: Batcher[int, int]) -> None:
    occupy(model, batcher)
    before, work, after = batcher.submit(2), batcher.call(lambda: len(model.seen)), batcher.submit(3)
    fails = batcher.call(lambda: 1 // 0)
    model.may.set()
    assert (before.result(10), work.result(10), after.result(10)) == (4, 2, 9)
    assert model.seen == [[0], [2], [3]]
    with pytest.raises(ZeroDivisionError):
        fails.result(10)


def test_a_panic_ends_a_question_and_not_the_thread() -> None:
    class Panic(BaseException):
        pass

    def answer(questions: list[str]) -> list[str]:
        if "bad" in questions:
            raise Panic("oh")
        return questions

    batcher: Batcher[str, str] = Batcher(answer, most=4, pending=9)
    bad, work = batcher.submit("bad"), batcher.call(lambda: answer(["bad"]))
    for future in (bad, work):
        with pytest.raises(RuntimeError, match="oh"):
            future.result(10)
    assert batcher.submit("good").result(10) == "good"
    batcher.close()


def test_a_window_waits_for_more(model: Model) -> None:
    model.may.set()
    batcher = Batcher(model.answer, most=3, window=10.0)
    futures = [batcher.submit(n) for n in range(3)]
    assert [future.result(5) for future in futures] == [0, 1, 4]
    assert model.seen == [[0, 1, 2]]
    batcher.close()


def test_closing_answers_what_waits_and_refuses_what_comes(model: Model) -> None:
    batcher = Batcher(model.answer)
    future = batcher.submit(5)
    model.may.set()
    batcher.close()
    assert future.result(0) == 25
    with pytest.raises(Refusal, match="being stopped"):
        batcher.submit(6)
