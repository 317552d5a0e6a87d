"""The executor of a torchrun: workers are its processes, each with the task and the strategy of its own composition.

Rank 0 runs the loop and its own share of each call; the others wait for theirs. A rank that is lost ends the run: who
started it may start it again, from the last checkpoint.

Letters: R jobs, W ranks.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from fedsim.sim.collectives import Backend, outlined
from fedsim.sim.executor import Executor, Jobs, Lost, Results, StackRunner, T, grouped
from fedsim.sim.in_process import InProcess
from fedsim.sim.place import Place
from fedsim.sim.shares import Pieces, Share, broadcasts, check, run_pieces, run_share, share_out, together
from fedsim.sim.torchrun import join


class Ranks(Executor):
    """Workers are the ranks of a torchrun.

    Args:
        runner: runs one stack.
        here: this process's place.
        width: clients of a stack.
        workers: threads of each rank that run stacks side by side.
        threads: intra-op threads of each of them.
        costs: [N] what a client's job costs, to divide calls by.
        backend: by which ranks talk to each other.
        what: what fixes the bits beside the config, the same on every rank.

    Raises:
        ConfigError: if not all ranks come, or they differ.
    """

    def __init__(
        self,
        runner: StackRunner,
        here: Place,
        *,
        width: int,
        workers: int,
        threads: int,
        costs: Tensor,
        backend: Backend,
        what: str,
    ) -> None:
        self.runner, self.width, self.costs = runner, width, costs
        self.group = join(here, what, backend)
        self._pool = InProcess(runner, width=width, workers=workers, threads=threads)
        self._between_calls = True

    def run(self, jobs: Jobs) -> Results:
        """Run jobs on all ranks.

        Raises:
            ClientError: a client half raised; its own exception is the cause.
            Lost: a rank is gone, and so is the run.
        """
        if not len(jobs.ids):
            return self._pool.run(jobs)
        groups = grouped(self.cut(jobs))
        indices, shares = zip(*share_out(jobs, groups, self.costs[jobs.ids], self.group.size), strict=True)
        return together(len(jobs.ids), indices, self._divided(shares, broadcasts(jobs)))

    def map(self, work: Callable[..., T], pieces: Sequence[Any], **shared: Any) -> list[T]:
        """See `Executor`; every rank takes neighbouring pieces.

        Raises:
            Lost: a rank is gone, and so is the run.
        """
        name, size, outlines = self.name_of_method(work), -(-len(pieces) // self.group.size), outlined(shared)
        parts = [Pieces(name, pieces[r * size : (r + 1) * size], outlines) for r in range(self.group.size)]
        check(outcomes := self._divided(parts, [shared]))
        return [value for values in outcomes for value in values]

    def serve(self) -> bool:
        """On every rank but 0: run shares until rank 0 has no more.

        Raises:
            Lost: if rank 0 is gone, or another rank is.
        """
        if self.group.rank == 0:
            return False
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):  # sent to all ranks; rank 0 ends its round and then this
                signal.signal(number, signal.SIG_IGN)
        while (part := self.group.receive(0)) is not None:
            self.group.send(self._run(part, []), 0)
        return True

    def close(self) -> None:
        """Let the other ranks go."""
        if self.group.rank == 0 and self._between_calls:
            try:
                for rank in range(1, self.group.size):
                    self.group.send(None, rank)
            except Lost:
                pass
        self.group.close()
        self._pool.close()

    def _divided(self, parts: Sequence[Share | Pieces], own: list[Mapping[str, Any]]) -> list[Any]:
        """[W] what the ranks gave, each for its part, and what is broadcast to them."""
        self._between_calls = False
        for rank, part in enumerate(parts[1:], 1):
            self.group.send(part, rank)
        outcomes = [self._run(parts[0], own), *(self.group.receive(rank) for rank in range(1, self.group.size))]
        self._between_calls = True
        return outcomes

    def _run(self, part: Share | Pieces, own: list[Mapping[str, Any]]) -> Any:
        """This rank's part of a call."""
        if isinstance(part, Share):
            return run_share(part, own, self.runner, self._pool.in_order, self.group)
        return run_pieces(part, own, self._pool, self.group)
