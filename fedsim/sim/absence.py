"""Absence in virtual time: who is there, until when, and which jobs never end with a reply.

A job dies when its client goes off line before its reply has arrived, or by itself, at a share of its time. The server
learns of it at once, as of a connection that breaks, and the client is idle again. What the client was sent counts as
downloaded; of its reply counts what was on its way by then.

Letters: R jobs or clients, A of them on line.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from fedsim.sim.account import TOLERANCE
from fedsim.sim.availability import Always, Availability
from fedsim.streams import Streams

LOOKS = 10_000  # moments at which enough clients may be on line, until it is given up that they ever are
BLOCK = 1 << 17  # clients that are asked about at a time


@dataclass(frozen=True, kw_only=True)
class Dropout:
    """Jobs that die by themselves: each with this probability, at a share of its time that is drawn evenly.

    Of work in two messages each half may die.

    Args:
        probability: in [0, 1).
    """

    probability: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.probability < 1:
            raise ValueError(f"probability must lie in [0, 1), or no job would ever end; got {self.probability}")


@dataclass(frozen=True)
class Ends:
    """How jobs end.

    Args:
        at: [R] float64 seconds.
        lost: [R] bits of its reply that a job which dies has sent by then; -1 for one that ends with its reply.
    """

    at: Tensor
    lost: Tensor

    @property
    def well(self) -> Tensor:
        """[R] bool: which end with a reply."""
        return self.lost < 0

    def closing(self, first: int | None) -> float:
        """Seconds at which so many replies are there, or else all of these jobs have ended."""
        arrivals = self.at[self.well].sort().values
        if first is not None and 0 < first <= len(arrivals):
            return float(arrivals[first - 1])
        return float(self.at.max())


@dataclass(frozen=True, kw_only=True)
class Absence:
    """When clients are away, and which jobs die.

    Args:
        availability: when clients can be reached.
        dropout: jobs that die by themselves.
        seed: of the run.
    """

    availability: Availability = Always()
    dropout: Dropout = Dropout()
    seed: int = 0

    @property
    def away(self) -> bool:
        """Whether clients may be off line."""
        return not isinstance(self.availability, Always)

    @property
    def kills(self) -> bool:
        """Whether jobs may die."""
        return self.away or self.dropout.probability > 0

    def on_line(self, ids: Tensor, now: float) -> Tensor:
        """[R] bool: which of these clients can be reached."""
        parts = [self.availability.on_line(self.seed, some, now) for some in ids.split(BLOCK)]
        return torch.cat(parts) if len(parts) != 1 else parts[0]

    def wait(self, ids: Tensor, now: float, at_least: int) -> tuple[float, Tensor]:
        """(seconds when at least so many of these clients are on line, from `now` on; which [R] bool).

        Raises:
            ValueError: if that will never be.
        """
        start, most = now, 0
        for _ in range(LOOKS):
            on = self.on_line(ids, now)
            there = int(on.sum())
            if there >= at_least:
                return now, on
            most, short = max(most, there), at_least - there
            back = self.availability.changes(self.seed, ids[~on], now, inf)
            # so many must come back at least, and before that it is not worth looking
            then = float(back.kthvalue(short).values) if short <= len(back) else inf
            if then == inf:
                break
            now = then
        looked = "and nobody comes any more" if now == start else f"and by second {now:.6g} never were"
        raise ValueError(
            f"{at_least} of {len(ids)} clients are needed at once from second {start:.6g} on, where {most} are on line "
            f"at most {looked}; change clients.availability"
        )

    def ends(
        self,
        ids: Tensor,
        numbers: Tensor,
        now: float,
        finish: Tensor,
        upload: Tensor,
        bits: Tensor,
        second: bool = False,
    ) -> Ends:
        """How jobs end that are sent now.

        Args:
            ids, numbers: [R] of the jobs.
            now: seconds.
            finish: [R] seconds at which the replies arrive, if they do.
            upload: [R] seconds at which they begin to be sent.
            bits: [R] of the replies.
            second: whether these are the second halves of jobs whose first halves did not die.
        """
        dies, at = torch.zeros(len(ids), dtype=torch.bool), torch.full_like(finish, inf)
        if self.dropout.probability:
            u = Streams(self.seed, ids, numbers).uniform("dropout", 2, step=int(second), dtype=torch.float64)
            dies = u[:, 0] < self.dropout.probability
            at = torch.where(dies, now + u[:, 1] * (finish - now), inf)
        if self.away:
            leaves = self.availability.changes(self.seed, ids, now, float(finish.max()))
            dies, at = dies | (leaves < finish - TOLERANCE), torch.minimum(at, leaves)
        sent = ((at - upload) / (finish - upload)).clamp(0, 1).nan_to_num(0.0) * bits
        return Ends(torch.where(dies, at, finish), torch.where(dies, sent.floor().long(), -1))
