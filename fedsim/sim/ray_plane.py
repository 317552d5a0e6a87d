"""Folds of Ray workers that talk to each other by torch.distributed; Ray keeps placement, control and recovery.

An epoch is a set of workers that have a process group: whoever was free when it began. Each call divides the groups of
stacks among them, the first hands the model on, and its sum is the one vector that the driver gets. A worker that dies
or hangs ends the epoch; that call runs again by the object store, and the next begins an epoch with whoever is there.

Letters: W workers.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

from fedsim.config import first_line
from fedsim.sim.collectives import Backend, open_store
from fedsim.sim.packing import Parcel
from fedsim.sim.ray_pool import ATTEMPTS, JOIN_SECONDS, RayPool, Worker

_log = logging.getLogger("fedsim")


class Plane:
    """The workers' own way to fold.

    Args:
        pool: the actors.
        backend: of their groups.
        host: this process's address, as the workers know it: they find each other in its store.
        timeout_seconds: for one call.
    """

    def __init__(self, pool: RayPool, backend: Backend, host: str, timeout_seconds: float) -> None:
        self._pool, self._backend, self._host, self._timeout_seconds = pool, backend, host, timeout_seconds
        self._store = open_store(host)
        self._members = list[Worker]()
        self._epoch = self._size = 0
        self._failures = 0  # in a row

    @property
    def given_up(self) -> bool:
        """Whether groups kept failing."""
        return self._failures >= ATTEMPTS

    def members(self) -> int:
        """How many workers the next call has."""
        self._members = [] if self.given_up else self._meet()
        return len(self._members)

    def run(self, parcels: Iterator[Parcel]) -> list[Parcel]:
        """Run a call on the members.

        Args:
            parcels: what is broadcast, then each member's share (`fedsim.sim.shares`).

        Returns:
            What they gave; nothing if the epoch ended: then nothing has happened.
        """
        members, sent = self._members, self._pool.ray.put(next(parcels))
        calls = []
        for rank, (worker, share) in enumerate(zip(members, parcels, strict=True)):
            own = sent if rank == 0 else None
            calls.append((worker, worker.actor.run_share.remote(self._pool.setting, self._epoch, share, own)))
        # twice the group's own deadline, so that those who wait for a worker that hangs tell of it first
        outcomes = self._pool.each(calls, 2 * self._timeout_seconds)
        if isinstance(outcomes, Exception):
            self._end(members, outcomes)
            return []
        self._failures = 0
        return outcomes

    def _meet(self) -> list[Worker]:
        """The workers of the next call's epoch, which is a new one if others are there than in the last."""
        free = self._pool.free(JOIN_SECONDS if self._epoch == 0 else 0.0)
        if len(free) < 2 or all(w.epoch == self._epoch > 0 for w in free) and len(free) == self._size:
            return free
        self._epoch, self._size = self._epoch + 1, len(free)
        place = (self._host, self._store.port)
        calls = [
            (w, w.actor.join.remote(self._epoch, *place, rank, len(free), self._backend, self._timeout_seconds))
            for rank, w in enumerate(free)
        ]
        if isinstance(joined := self._pool.each(calls, 2 * JOIN_SECONDS), Exception):
            self._end(free, joined)
            return []
        for worker in free:
            worker.epoch = self._epoch
        return free

    def _end(self, members: list[Worker], lost: Exception) -> None:
        """A worker was lost, and with it the epoch."""
        for worker in members:
            worker.epoch = 0
        self._failures += 1
        until = "from now on" if self.given_up else "this time"
        why = first_line(lost)
        _log.warning("the workers' group is dissolved (%s); %s sums go through the object store", why, until)
