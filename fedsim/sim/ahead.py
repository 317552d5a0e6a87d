"""Replies that are computed before they are due, in the same stacks as those that are, and wait to be received.

So asynchronous runs work on full stacks, whatever model each job started from. No more replies wait than a few
such stacks hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fedsim.sim.calls import Calls
from fedsim.sim.events import Event, EventQueue, Sent
from fedsim.sim.executor import Results


def compute(due: list[Event], queue: EventQueue, most: int, calls: Calls, sent: Mapping[int, Sent], round: int) -> None:
    """Compute what is due and, in the same stacks, what will be due next, as long as no more than `most` wait.

    Args:
        due: jobs that have left the queue.
        queue: the others in flight.
        most: replies that may wait.
        calls: where jobs run.
        sent, round: what jobs were sent, and the round.
    """
    missing = [e for e in due if e.result is None]
    if not missing:
        return
    waiting, coming = list[Event](), list[Event]()
    for event in queue:
        if event.lost < 0:
            (coming if event.result is None else waiting).append(event)
    pending = missing + coming[: max(most - len(waiting) - len(missing), 0)]
    pending.sort(key=lambda e: e.sequence)
    for work in dict.fromkeys(sent[e.sent].work for e in pending):
        events = [e for e in pending if sent[e.sent].work == work]
        results = calls.executor.run(calls.of(events, sent, round))
        for event, result in zip(events, results.apart(), strict=True):
            event.result = result
    if _rows_held(waiting) > 2 * most:
        _keep_only_what_waits(queue)


def packed(queue: EventQueue) -> dict[str, Any]:
    """What a checkpoint needs of the jobs in flight and of the replies that wait."""
    waiting = _keep_only_what_waits(queue)
    return {
        "queue": [replace(event, result=None) for event in queue],
        "waiting": [event.sequence for event in waiting],
        "replies": Results.together([event.result for event in waiting if event.result is not None]),
    }


def unpacked(state: Mapping[str, Any]) -> EventQueue:
    """The queue of which `packed` said that."""
    queue = EventQueue(state["queue"])
    events = {e.sequence: e for e in queue}
    for sequence, reply in zip(state["waiting"], state["replies"].apart(), strict=True):
        events[sequence].result = reply
    return queue


def _keep_only_what_waits(queue: EventQueue) -> list[Event]:
    """The events whose replies wait; these become copies, so that the rest of their stacks takes no room."""
    waiting = [e for e in queue if e.result is not None]
    replies = Results.together([e.result for e in waiting if e.result is not None])
    for event, reply in zip(waiting, replies.apart(), strict=True):
        event.result = reply
    return waiting


def _rows_held(events: list[Event]) -> int:
    """Rows of all the stacks to which computed replies belong."""
    stacks = {id(e.result.fields[0]): e.result.fields[0] for e in events if e.result and e.result.fields}
    return sum(len(next(iter(fields.values()))) for fields in stacks.values())
