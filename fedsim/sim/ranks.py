"""The executor of a torchrun: workers are its processes, each with the task and the strategy of its own composition.

Rank 0 runs the loop and its own share of each call; the others wait for theirs. A rank that is lost ends the run: who
started it may start it again, from the last checkpoint.

Letters: R jobs, W ranks.
"""

from __future__ import annotations

import signal
import threading

from torch import Tensor

from fedsim.sim.collectives import Backend
from fedsim.sim.executor import Executor, Jobs, Lost, Results, StackRunner, grouped
from fedsim.sim.in_process import InProcess
from fedsim.sim.place import Place
from fedsim.sim.shares import Share, broadcasts, run_share, share_out, together
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
        self.num_examples = runner.task.num_examples
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
        (_, mine), *others = whole = share_out(jobs, groups, self.costs[jobs.ids], self.group.size)
        self._between_calls = False
        for rank, (_, share) in enumerate(others, 1):
            self.group.send(share, rank)
        outcomes = [run_share(mine, broadcasts(jobs), self.runner, self._pool.in_order, self.group)]
        outcomes += [self.group.receive(rank) for rank in range(1, self.group.size)]
        self._between_calls = True
        return together(len(jobs.ids), [index for index, _ in whole], outcomes)

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
        while isinstance(share := self.group.receive(0), Share):
            outcome = run_share(share, [], self.runner, self._pool.in_order, self.group)
            self.group.send(outcome, 0)
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
