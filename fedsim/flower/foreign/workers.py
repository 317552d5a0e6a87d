"""Nodes of a Flower app in Ray workers.

What a node does is a function of bytes, so any process may do it, or do it again. The messages of a push are shared out
among the workers. What a node keeps travels with its message and comes back with the answer, so that a worker that is
lost takes nothing with it: its share runs again on another. The app is loaded once in each. As in one process, a
message's random numbers depend on (seed, client, message) alone.

Letters: W workers.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from flwr.clientapp import ClientApp

from fedsim.config import first_line
from fedsim.flower.foreign import private
from fedsim.flower.foreign.nodes import Answer, Job, NodeRunner
from fedsim.sim.executor import shown
from fedsim.sim.failure import Failure
from fedsim.sim.packing import Parcel, pack, unpack
from fedsim.sim.ray_pool import RayPool, Worker, WorkersLost


@dataclass(frozen=True)
class NodeSetting:
    """What a worker makes a `NodeRunner` of.

    Args:
        folder: of the app; all workers find it under this path.
        reference: of its ClientApp.
        count, run_config, seed: of the run.
    """

    folder: Path
    reference: str
    count: int
    run_config: Mapping[str, Any]
    seed: int

    def open(self) -> NodeRunner:
        """Load the app; whatever that raises is raised."""
        private.begin_run()
        app = private.load(self.reference, self.folder, ClientApp)
        gc.freeze()  # Flower collects garbage for every list of arrays, and would look through all modules each time
        return NodeRunner(app, self.count, self.run_config, self.seed)


class NodeActor:
    """What runs in a worker's process. All that it keeps comes anew with every call, so restarts lose nothing."""

    def __init__(self, threads: int) -> None:
        torch.set_num_threads(threads)
        self._runner: NodeRunner | None = None

    def ready(self, setting: Parcel) -> Failure | None:
        """Load the app."""
        try:
            self._open(setting)
        except Exception as error:
            return Failure.of(WorkersLost(f"a Ray worker can't load the app: {first_line(error)}"))
        return None

    def run(self, setting: Parcel, jobs: Parcel) -> Parcel:
        """Let nodes answer messages, one after the other."""
        return pack(list(self._open(setting).answers(unpack(jobs))))

    def _open(self, setting: Parcel) -> NodeRunner:
        if self._runner is None:
            self._runner = unpack(setting).open()
        return self._runner


class RayNodes:
    """All nodes of a run, in Ray workers.

    Args:
        setting: of the run.
        workers: W; None for as many as there is room for.
        threads, gpus: of each.
        address: see `RayPool`.
        timeout_seconds: for one message, after which its worker counts as hung and is replaced.

    Raises:
        ValueError: if there is no cluster at the address, or no room for a worker.
    """

    def __init__(
        self,
        setting: NodeSetting,
        *,
        workers: int | None = None,
        threads: int = 1,
        gpus: int = 0,
        address: str | None = None,
        timeout_seconds: float = 1800.0,
    ) -> None:
        self._timeout_seconds = timeout_seconds
        self.pool = RayPool(NodeActor, pack(setting), workers=workers, threads=threads, gpus=gpus, address=address)

    def answers(self, jobs: Sequence[Job]) -> Iterator[Answer]:
        """What the nodes answer.

        Raises:
            WorkersLost: if one worker's share, or every worker's start, was lost time and again.
        """
        n, num_shares = len(jobs), min(len(jobs), len(self.pool.workers))
        shares = [jobs[k * n // num_shares : (k + 1) * n // num_shares] for k in range(num_shares)]

        def ask(worker: Worker, index: int) -> Any:
            return worker.actor.run.remote(self.pool.setting, pack(shares[index]))

        def what(index: int) -> str:
            clients = torch.tensor([job.node - 1 for job in shares[index]])
            return f"{shares[index][0].message_type} on client(s) {shown(clients)}"

        found = self.pool.in_order(
            num_shares,
            ask,
            lambda index: self._timeout_seconds * len(shares[index]),
            what,
            "lower runtime.workers",
        )
        for answers in found:
            yield from unpack(answers)

    def close(self) -> None:
        """Stop the workers, and the runtime if it was started here."""
        self.pool.close()
