"""The queue of jobs: order of arrival, ties, and what may be popped."""

from __future__ import annotations

from math import inf

from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.sim.events import Event, EventQueue


def _event(finish: float, sequence: int) -> Event:
    return Event(finish, sequence, client=sequence, number=0, sent=0, started=0.0)


@given(st.lists(st.sampled_from([0.0, 1.0, 1.5, 2.0, inf]), max_size=12), st.sampled_from([-1.0, 1.0, 1.7, inf]))
@settings(max_examples=60, deadline=None)
def test_events_leave_by_time_and_then_in_the_order_of_sending(times: list[float], until: float) -> None:
    queue = EventQueue(_event(t, i) for i, t in enumerate(times))
    expected = sorted((t, i) for i, t in enumerate(times))
    assert [(e.finish, e.sequence) for e in queue] == expected
    popped = queue.pop(until)
    assert [(e.finish, e.sequence) for e in popped] == [k for k in expected if k[0] <= until]
    assert len(queue) == len(times) - len(popped)


def test_a_count_limits_what_is_popped() -> None:
    queue = EventQueue()
    queue.push([_event(3.0, 0), _event(1.0, 1), _event(2.0, 2)])
    assert [e.client for e in queue.pop(inf, 2)] == [1, 2]
    assert [e.client for e in queue.pop(inf, 2)] == [0]
    assert queue.pop(inf, 2) == []


def test_looking_at_the_queue_leaves_it_as_it_is() -> None:
    queue = EventQueue([_event(2.0, 0), _event(1.0, 1)])
    assert [e.client for e in queue] == [e.client for e in queue] == [1, 0]
    assert len(queue) == 2
