"""Numbers arrive in the order of their steps, at once on a CPU."""

import dataclasses

import pytest
import torch

from eclip.training.flight import LAG, InFlight


def _send(flight: InFlight, step: int) -> None:
    means = torch.tensor([step + 0.25, step + 0.5])
    flight.send(step, [f"p{step}/000.jpg"], 1e-3 * step, ["loss", "grad_norm"], means, means + 1)


def test_a_cpu_gives_every_step_at_once() -> None:
    flight = InFlight()
    for step in range(3):
        _send(flight, step)
        (record,) = flight.arrived(everything=False)
        assert record.step == step
        assert record.means == {"loss": step + 0.25, "grad_norm": step + 0.5}
        assert record.own == {"loss": step + 1.25, "grad_norm": step + 1.5}
        assert record.keys == [f"p{step}/000.jpg"]
        assert record.learning_rate == 1e-3 * step
        assert record.finite
    assert not list(flight.arrived(everything=True))


class _Event:
    """A copy that is under way until somebody waits for it."""

    waited = 0

    def synchronize(self) -> None:
        _Event.waited += 1


def test_a_device_is_waited_for_when_it_is_two_steps_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Event, "waited", 0)
    flight = InFlight()
    seen = []
    for step in range(5):
        _send(flight, step)
        flight._sent[-1] = dataclasses.replace(flight._sent[-1], arrival=_Event())  # type: ignore[arg-type]
        seen.append([record.step for record in flight.arrived(everything=False)])
    assert seen == [[]] * LAG + [[0], [1], [2]]
    assert _Event.waited == 3
    assert [record.step for record in flight.arrived(everything=True)] == [3, 4]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place, taken", [(0, False), (1, False), (2, True), (3, True)])
def test_a_step_is_taken_by_the_numbers_that_every_step_has(bad: float, place: int, taken: bool) -> None:
    """The device decides and the host says afterwards: alike, and not by what is looked at for a log line."""
    flight, names = InFlight(), ["loss", "grad_norm", "grad_square/decoder", "grad_square/heads"]
    means = torch.ones(4)
    means[place] = bad
    decided = flight.send(0, [], 1e-3, names, means, torch.ones(4), observed=2)
    assert decided.shape == ()
    assert bool(decided) is taken
    (record,) = flight.arrived(everything=True)
    assert record.finite is taken
    assert list(record.means) == names
