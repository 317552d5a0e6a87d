"""Processes that find each other as those of a torchrun do, without a second of torch's import for each.

They are forked from a server that has imported torch once. What they run is imported by name, as are its arguments.
"""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fedsim.cohort import Cohort
from fedsim.config import ConfigError
from fedsim.runs import run
from fedsim.sim import torchrun
from fedsim.sim.executor import ClientError, Jobs, Lost, Results, StackRunner
from fedsim.sim.packing import Parcel, pack, unpack
from fedsim.sim.place import Place, place
from fedsim.sim.ranks import Ranks
from tests.build import Rows, without_wall_time
from tests.composition import pair
from tests.fedsim.sim.namespaces import PORT, Node
from tests.fedsim.sim.ray_cases import NUM_CLIENTS, Toy, die_in, runner, some_jobs

SECONDS = 100  # after which a process counts as hung


def launch(size: int, function: Callable[..., Any], *args: Any, nodes: Sequence[Node] = ()) -> list[Any]:
    """What a function returns on each rank: its value, an exception, or the number of the signal that ended it.

    With nodes each rank is on its own, and the store of all on the first's.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    if nodes:
        where = {"MASTER_ADDR": nodes[0].address, "MASTER_PORT": str(PORT), "TORCHELASTIC_USE_AGENT_STORE": "False"}
    else:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    started = []
    for rank in range(size):
        mine, theirs = context.Pipe(duplex=False)
        env = where | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
        node = nodes[rank] if nodes else None
        process = context.Process(target=_child, args=(theirs, env, node, pack((function, args))))
        process.start()
        theirs.close()
        started.append((process, mine))
    return [_outcome(process, pipe) for process, pipe in started]


def _outcome(process: Any, pipe: Connection) -> Any:
    try:
        value = unpack(pipe.recv()) if pipe.poll(SECONDS) else TimeoutError("it hangs")
    except EOFError:
        value = None
    process.join(5)
    if process.exitcode is None:
        process.kill()
        process.join()
    pipe.close()
    return value if process.exitcode == 0 else -(process.exitcode or 0)


def _child(pipe: Connection, env: dict[str, str], node: Node | None, what: Parcel) -> None:
    if node is not None:
        node.enter()
    function, args = unpack(what)  # by bytes, for torch would send tensors as files of a process that may be gone
    os.environ |= env | {"LOCAL_WORLD_SIZE": env["WORLD_SIZE"]}
    torch.set_num_threads(1)
    try:
        value = function(*args)
    except Exception as error:
        error.add_note(traceback.format_exc())
        value = error
    pipe.send(pack(value))
    pipe.close()


def here() -> Place:
    """The place of a process that was launched."""
    found = place()
    assert found is not None
    return found


def executor(whole: StackRunner, *, what: str = "the same", width: int = 1) -> Ranks:
    costs = torch.arange(NUM_CLIENTS) * 7 % 23 + 1
    return Ranks(whole, here(), width=width, workers=1, threads=1, costs=costs, backend="gloo", what=what)


def run_all(calls: list[Jobs], folder: str = "") -> list[Results | Exception]:
    """Every call's results, or the exception that it raised; nothing on the ranks that serve."""
    ranks = executor(runner(folder))
    out: list[Results | Exception] = []
    if not ranks.serve():
        for jobs in calls:
            try:
                got = ranks.run(jobs)
            except ClientError as error:
                out.append(error)
            else:
                out.append(Results(dict(got.fields), got.sums, dict(got.memory), dict(got.metrics), got.bits_up))
    ranks.close()
    return out


EVALUATED: dict[str, Any] = {
    "rounds": 2,
    "task": {"name": "classification", "dataset": "digits", "model": {"name": "mlp", "hidden": [8]}},
    "clients": {"count": 4, "byzantine": {"attack": "label_flip", "count": 1}},
    "strategy": {"name": "fedavg"},
    "local": {"steps": 1},
    "evaluate": {"every": 1},
    "runtime": {"stack": 2, "workers": 1},
}


def evaluated(out: str) -> Rows:
    """Rows of a run whose samples are two pieces of clients' and one of held-out ones; its folder on rank 0."""
    return without_wall_time(run(EVALUATED, out=out).rows)


def bad_pieces() -> str:
    """What rank 0 hears of a method that raises on every rank, and what a call after it gives."""
    ranks = executor(runner())
    if ranks.serve():
        return ""
    try:
        ranks.map(ranks.runner.task.evaluate_clients, [torch.zeros(33)] * 4, nobody=None)
    except TypeError as error:
        found = ranks.map(ranks.runner.task.evaluate_clients, [torch.zeros(33)] * 4, pool=None)
        return f"{error}, then {len(found)}"
    finally:
        ranks.close()
    return "nothing"


class Uneven(Toy):
    """Stacks of clients below 20 reply one field more."""

    def step(self, clients: Cohort, x: Tensor) -> dict[str, Tensor]:
        reply = super().step(clients, x)
        return {**reply, "more": reply["length"]} if int(clients.ids[0]) < 20 else reply


def run_uneven() -> Any:
    whole = runner()
    whole.strategy = Uneven()
    ranks = executor(whole)
    jobs = some_jobs()
    order = torch.argsort(whole.task.num_examples[jobs.ids], descending=True, stable=True)
    low = torch.cat([i[None] for i in order if int(jobs.ids[i]) < 20])[:1]
    late = [int(i) for i in order if int(jobs.ids[i]) >= 20 and whole.task.num_examples[jobs.ids[i]] == 1][:1]
    try:
        return None if ranks.serve() else ranks.run(jobs.rows(torch.tensor([int(low), *late])))
    finally:
        ranks.close()


def run_and_die(victim: int, where: str) -> Any:
    """A call in which one rank is killed at the start of a part of it."""
    ranks = executor(runner())
    if ranks.group.rank == victim:
        die_in(where)
    try:
        return ranks.serve() or ranks.run(some_jobs())
    finally:
        ranks.close()


def join_or_not(absent: int | None, refusing: int | None, odd: int | None) -> str:
    """What a rank says that joins, while another does not."""
    torchrun.JOIN_SECONDS = 3.0
    me = here()
    if me.rank == absent:
        return "absent"
    if me.rank == refusing:
        torchrun.refuse(me, "data.root: nothing there")
        return "refused"
    try:
        executor(runner(), what="stacks of 3" if me.rank == odd else "stacks of 2").close()
    except (ConfigError, Lost) as error:
        return f"{type(error).__name__}: {error}"
    return "joined"


def rows(strategies: list[str]) -> list[Rows]:
    """The metrics of short runs, one after the other; none on the ranks that serve."""
    out = []
    for strategy in strategies:
        history = run({**pair(strategy, None), "rounds": 4, "runtime": {"stack": 1, "workers": 1}})
        out.append(without_wall_time(history.rows))
    return out
