"""Names in a trace, and nothing where none is made."""

import torch
from torch.profiler import ProfilerActivity, profile

from eclip.training.metrics.spans import span


def test_a_span_is_in_a_trace() -> None:
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as found, span("rows"), span("backward"):
        torch.ones(2) + 1
    names = [event.key for event in found.key_averages()]
    assert {"rows", "backward", "aten::add"} <= set(names)


def test_without_a_profiler_nothing_happens() -> None:
    made = span("rows")
    for _ in range(2):  # it may be entered again
        with made:
            assert made._record is None


def test_an_error_ends_the_span() -> None:
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as found:
        try:
            with span("data"):
                raise KeyError
        except KeyError:
            torch.ones(2) + 1
    events = {event.name: event for event in found.events()}
    assert events["aten::add"].time_range.start >= events["data"].time_range.end
