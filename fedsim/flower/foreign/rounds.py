"""The rows of a Flower app's run: one for each round, with what travelled and what the clients reported.

A round is what is pushed one after the other with the same group id, or, without one, with the same `server-round` in a
ConfigRecord, as Flower's strategies have it; messages with neither are a round for each push. What arrives belongs to
the round that is going on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Message, RecordDict

SERVER_ROUND = "server-round"
WEIGHTS = "num-examples", "num_examples"  # of Flower's strategies, and of its older replies


@dataclass
class RoundLog:
    """What has happened.

    Args:
        write: takes each row when its round is over.
        bits_up, bits_down: of all messages so far: 8 times the bytes of their records.
        round: how many rounds have begun.
        errors: replies that were errors, and those that were not.
    """

    write: Callable[[Mapping[str, Any]], None]
    bits_up: int = 0
    bits_down: int = 0
    round: int = 0
    errors: int = 0
    replies: int = 0
    _group: str = ""
    _row: dict[str, Any] = field(default_factory=dict)
    _sums: dict[str, tuple[float, float]] = field(default_factory=dict)
    _began: float = field(default_factory=time.perf_counter)

    def begin(self, message: Message, first: bool, now: float) -> None:
        """A message is pushed, the first of its push or not, at this virtual time in seconds."""
        group = group_of(message)
        if self._row and (group == self._group if group else not first):
            return
        self.close(now)
        self.round, self._group = self.round + 1, group
        self._row = {"round": self.round, "group": group, "messages": 0, "replies": 0, "errors": 0}

    def sent(self, bits: int) -> None:
        """A message has been pushed; of one that reaches nobody, none of its bits."""
        self._row["messages"] += 1
        self.bits_down += bits

    def came(self, kind: str, bits: int, content: RecordDict | None, dropped: bool) -> None:
        """A reply to a message of this type has arrived; None for an error, which may be that its node is gone."""
        self.bits_up += bits
        if content is None:
            self.errors += 1
            self._row["errors"] += 1
            if dropped:
                self._row["num_dropped"] = self._row.get("num_dropped", 0) + 1
            return
        self.replies += 1
        self._row["replies"] += 1
        numbers = numbers_of(content)
        weight = next((numbers[key] for key in WEIGHTS if numbers.get(key, 0) > 0), 1.0)
        for key, value in numbers.items():
            if key not in WEIGHTS:
                total, weights = self._sums.get(f"{kind}.{key}", (0.0, 0.0))
                self._sums[f"{kind}.{key}"] = total + weight * value, weights + weight

    def close(self, now: float) -> None:
        """Write the row of the round that is going on, if there is one."""
        if not self._row:
            return
        means = {key: total / weights for key, (total, weights) in self._sums.items()}
        totals = {"virtual_seconds": now, "wall_seconds": time.perf_counter() - self._began}
        self.write({**self._row, **means, **totals, "bits_up": self.bits_up, "bits_down": self.bits_down})
        self._row, self._sums = {}, {}


def group_of(message: Message) -> str:
    """To which of its app's rounds a message belongs; empty where it says nothing of it."""
    said = [record[SERVER_ROUND] for record in message.content.config_records.values() if SERVER_ROUND in record]
    return str(message.metadata.group_id or (said[0] if said else ""))


def numbers_of(content: RecordDict) -> dict[str, float]:
    """The numbers that a reply reports, by name: those of its MetricRecords, and of the ConfigRecord in which Flower's
    older clients have their metrics."""
    older = [record for name, record in content.config_records.items() if name.endswith(".metrics")]
    records = [*content.metric_records.values(), *older]
    found = {key: value for record in records for key, value in record.items()}
    return {key: float(v) for key, v in found.items() if isinstance(v, int | float) and not isinstance(v, bool)}
