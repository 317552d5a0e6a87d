"""The executor in process: a worker is a thread with its own intra-op threads and its own buffers.

torch releases the interpreter's lock inside its operations, so threads use the cores without copying anything.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fedsim import pages
from fedsim.sim.executor import Executor, Jobs, Results, StackRunner, T, grouped
from fedsim.sim.gather import Gather, collect


class InProcess(Executor):
    """Workers are threads of this process.

    Args:
        runner: runs one stack.
        width: clients of a stack.
        workers: threads that run stacks side by side.
        threads: intra-op threads of each worker.
    """

    def __init__(self, runner: StackRunner, *, width: int, workers: int = 1, threads: int = 1) -> None:
        self.runner, self.width, self.workers = runner, width, workers
        pages.keep_freed_memory()
        self._pool = ThreadPoolExecutor(
            workers, thread_name_prefix="fedsim-worker", initializer=torch.set_num_threads, initargs=(threads,)
        )

    def run(self, jobs: Jobs) -> Results:
        stacks = self.cut(jobs)
        parts, groups = self.in_order(stacks, jobs), grouped(stacks)
        gather = Gather(len(jobs.ids), self.runner.name_of(jobs.work), len(groups))
        collect(gather, groups, parts)
        return gather.results

    def in_order(self, stacks: list[Tensor], jobs: Jobs) -> Iterator[Results]:
        """Results in the order of the stacks, at most two stacks per worker ahead, so that memory stays bounded."""
        waiting: deque[Future[Results]] = deque()
        ahead = iter(stacks)
        try:
            for _ in range(len(stacks)):
                while len(waiting) < 2 * self.workers and (index := next(ahead, None)) is not None:
                    waiting.append(self._pool.submit(self.runner.run, jobs.rows(index)))
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

    def map(self, work: Callable[..., T], pieces: Sequence[Any], **shared: Any) -> list[T]:
        return list(self._pool.map(partial(work, **shared), pieces))

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
