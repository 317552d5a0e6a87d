"""Folds of Ray workers that talk to each other by torch.distributed; Ray keeps placement, control and recovery.

An epoch is a set of workers that have a process group: whoever was free when it began. Each call divides the groups of
stacks among them, the first hands the model on, and its sum is the one vector that the driver gets. A worker that dies
or hangs ends the epoch; that call runs again by the object store, and the next begins an epoch with whoever is there.

Letters: W workers.
"""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor

from fedsim.config import first_line
from fedsim.sim.collectives import Backend, open_store
from fedsim.sim.executor import Jobs, Results
from fedsim.sim.packing import pack
from fedsim.sim.ray_pool import ATTEMPTS, JOIN_SECONDS, RayPool, Worker
from fedsim.sim.shares import broadcasts, share_out, together

_log = logging.getLogger("fedsim")


class Plane:
    """The workers' own way to fold.

    Args:
        pool: the actors.
        backend: of their groups.
        host: this process's address, as the workers know it: they find each other in its store.
        pickler: takes the strategy's own classes.
        timeout_seconds: for one call.
        least_groups: of a call.
    """

    def __init__(
        self, pool: RayPool, backend: Backend, host: str, pickler: Any, timeout_seconds: float, least_groups: int = 2
    ) -> None:
        self._pool, self._backend, self._host, self._pickler = pool, backend, host, pickler
        self._timeout_seconds, self._least_groups = timeout_seconds, least_groups
        self._store = open_store(host)
        self._epoch = self._size = 0
        self._failures = 0  # in a row

    @property
    def given_up(self) -> bool:
        """Whether groups kept failing."""
        return self._failures >= ATTEMPTS

    def takes(self, jobs: Jobs, groups: list[list[Tensor]]) -> bool:
        """Whether a call goes this way: its replies are folded, and there are enough groups of stacks."""
        return not self.given_up and jobs.weights is not None and len(groups) >= self._least_groups

    def run(self, jobs: Jobs, groups: list[list[Tensor]], costs: Tensor) -> Results | None:
        """Run a call on the workers of an epoch.

        Args:
            jobs: R of them.
            groups: of stacks.
            costs: [R] of the jobs.

        Returns:
            The results; None if there is no epoch, or it ended: then nothing has happened.

        Raises:
            ClientError: if a client half raised.
        """
        members = self._members()
        if len(members) < 2:
            return None
        whole = share_out(jobs, groups, costs, len(members))
        sent = self._pool.ray.put(pack(broadcasts(jobs), share=True, pickler=self._pickler))
        calls = []
        for rank, (worker, (_, share)) in enumerate(zip(members, whole, strict=True)):
            parcel, own = pack(share, pickler=self._pickler), sent if rank == 0 else None
            calls.append((worker, worker.actor.run_share.remote(self._pool.setting, self._epoch, parcel, own)))
        # twice the group's own deadline, so that those who wait for a worker that hangs tell of it first
        outcomes = self._pool.each(calls, 2 * self._timeout_seconds)
        if isinstance(outcomes, Exception):
            self._end(members, outcomes)
            return None
        self._failures = 0
        return together(len(jobs.ids), [index for index, _ in whole], outcomes)

    def _members(self) -> list[Worker]:
        """The workers of this call's epoch, which is a new one if others are there than in the last."""
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
