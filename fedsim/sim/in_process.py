"""The executor in process: a worker is a thread with its own intra-op threads and its own buffers.

torch releases the interpreter's lock inside its operations, so threads use the cores without copying anything. On a GPU
several workers have a CUDA stream each (`fedsim.sim.lanes`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import Any

from torch import Tensor

from fedsim import pages
from fedsim.sim.executor import Executor, Jobs, Results, StackRunner, T, grouped
from fedsim.sim.gather import Gather, collect
from fedsim.sim.lanes import Errand, Lanes


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
        self._lanes = Lanes(runner.device if runner.device.type == "cuda" and workers > 1 else None)
        self._pool = ThreadPoolExecutor(
            workers, thread_name_prefix="fedsim-worker", initializer=self._lanes.open, initargs=(threads,)
        )

    def run(self, jobs: Jobs) -> Results:
        stacks = self.cut(jobs)
        parts, groups = self.in_order(stacks, jobs), grouped(stacks)
        gather = Gather(len(jobs.ids), self.runner.name_of(jobs.work), len(groups))
        collect(gather, groups, parts)
        return gather.results

    def in_order(self, stacks: list[Tensor], jobs: Jobs) -> Iterator[Results]:
        """Results in the order of the stacks."""
        return self._side_by_side(partial(self.runner.run, jobs.rows(index)) for index in stacks)

    def map(self, work: Callable[..., T], pieces: Sequence[Any], **shared: Any) -> list[T]:
        return list(self._side_by_side(partial(work, piece, **shared) for piece in pieces))

    def _side_by_side(self, calls: Iterator[Callable[[], T]]) -> Iterator[T]:
        """What calls give, in their order; at most two per worker are under way, so that memory stays bounded."""
        waiting: deque[Errand[T]] = deque()
        try:
            while True:
                waiting += [
                    self._lanes.give(call, self._pool) for call in islice(calls, 2 * self.workers - len(waiting))
                ]
                if not waiting:
                    return
                yield waiting.popleft().result()
        finally:
            for errand in waiting:
                errand.future.cancel()

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
