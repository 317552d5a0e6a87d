"""What drives Ray for a run: parcels go to the workers and come back, and nobody opens them on the way.

So it holds no copy of task, models or rows but what is on its way, knows none of the user's classes, and touches no
GPU, though what it hands on lay on one.

Letters: n calls, W workers.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

from fedsim.sim.collectives import Backend, Collectives, least_groups
from fedsim.sim.packing import Parcel
from fedsim.sim.pipe import NOTHING
from fedsim.sim.ray_plane import Plane
from fedsim.sim.ray_pool import RayPool, Worker
from fedsim.sim.ray_worker import Actor


class Driver:
    """Ray workers, and the runtime that they need.

    Args:
        setting: what every worker gets once.
        workers: how many; None for one per GPU of the cluster, or per `threads` CPUs.
        threads, gpus: of each.
        address: see `RayPool`.
        collectives, backend: how sums travel that workers join; without a backend they do not.
        nbytes: of the model.
        timeout_seconds: for one call, after which its worker counts as hung and is replaced.

    Attributes:
        num_workers: W.
        least_groups: of stacks in a call that workers may fold between them.

    Raises:
        ValueError: if there is no cluster at the address, or no room for a worker.
    """

    def __init__(
        self,
        setting: Parcel,
        *,
        workers: int | None,
        threads: int,
        gpus: int,
        address: str | None,
        collectives: Collectives,
        backend: Backend | None,
        nbytes: int,
        timeout_seconds: float,
    ) -> None:
        self.timeout_seconds, self.least_groups = timeout_seconds, sys.maxsize
        self.pool = RayPool(Actor, setting, workers=workers, threads=threads, gpus=gpus, address=address)
        self.num_workers = len(self.pool.workers)
        self.plane: Plane | None = None
        try:
            if backend is not None:
                ray = self.pool.ray
                host = ray.util.get_node_ip_address() if self.pool.others_join else "127.0.0.1"
                one = sum(node["Alive"] for node in ray.nodes()) == 1
                self.least_groups = least_groups(collectives, backend, one_machine=one, nbytes=nbytes)
                self.plane = Plane(self.pool, backend, host, timeout_seconds)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Stop the workers, and the runtime if it was started here."""
        self.plane = None
        self.pool.close()

    def in_order(
        self, method: str, used: Sequence[Sequence[int]], what: Sequence[str], parcels: Iterator[Parcel]
    ) -> Iterator[Parcel]:
        """What calls return that know nothing of each other, in their order, by whichever worker is free.

        Args:
            method: of the workers.
            used: [n] which of the shared parcels each call gets.
            what: [n] each call is, for messages.
            parcels: the shared ones, then [n] each call's own, taken when a worker is free for it.

        Raises:
            WorkersLost: one call, or every worker, was lost time and again.
            Exception: what a worker sent as a `Failure`.
        """
        num_shared = 1 + max((k for shared in used for k in shared), default=-1)
        shared = [self.pool.ray.put(next(parcels)) for _ in range(num_shared)]
        taken = list[Parcel]()

        def ask(worker: Worker, call: int) -> Any:
            while len(taken) <= call:
                taken.append(next(parcels))
            return self._ask(worker, method, taken[call], *(shared[k] for k in used[call]))

        relief = "lower runtime.stack or runtime.workers"
        outcomes = self.pool.in_order(len(used), ask, lambda _: self.timeout_seconds, lambda i: what[i], relief)
        for call, outcome in enumerate(outcomes):
            taken[call] = NOTHING
            yield outcome

    def members(self) -> int:
        """How many workers can fold a call between them."""
        return self.plane.members() if self.plane else 0

    def run_shares(self, parcels: Iterator[Parcel]) -> Iterator[Parcel]:
        """What the members gave, one after the other; nothing if one was lost, and then nothing has happened.

        Args:
            parcels: what is broadcast, then each member's share.
        """
        assert self.plane is not None, "whoever asks has seen that there are members"
        yield from self.plane.run(parcels)

    def _ask(self, worker: Worker, method: str, *args: Any) -> Any:
        """Ask a worker for something; the reference to its answer."""
        return getattr(worker.actor, method).remote(self.pool.setting, *args)
