"""Processes that torchrun started: how they find each other, or learn why one cannot come.

Every rank composes the run by itself. Rank 0 then runs the loop, writes and prints; what another rank has to say
before it joins, rank 0 says for it, so that a mistake is one message however many ranks make it.

Letters: W ranks.
"""

from __future__ import annotations

import os
from datetime import timedelta
from itertools import count

import torch.distributed as dist

from fedsim.config import ConfigError
from fedsim.sim.collectives import Backend, Group, said
from fedsim.sim.place import Place

JOIN_SECONDS = 300.0  # for a rank to import torch and to load the data
SHARE_SECONDS = 1800.0  # for one rank's part of one call
READY, REFUSED = "ready: ", "refused: "

_joined = count()  # a process that runs several experiments joins as many groups, one after the other


def join(here: Place, what: str, backend: Backend) -> Group:
    """The group of all ranks, once each of them is ready.

    Args:
        here: this process's place.
        what: this rank's part of what fixes the bits; the same on every rank.
        backend: of the group.

    Raises:
        ConfigError: on rank 0, if a rank does not come, cannot, or differs; on all ranks, if rank 0 cannot.
    """
    store = _store(JOIN_SECONDS)
    if here.rank:
        store.set(str(here.rank), READY + what)
        if (word := said(store, "0", 2 * JOIN_SECONDS)) is None or word.startswith(REFUSED):
            raise ConfigError(f"rank 0 did not join: {(word or 'no answer').removeprefix(REFUSED)}")
    else:
        try:
            for rank in range(1, here.size):
                _check(rank, said(store, str(rank), JOIN_SECONDS), what)
        except ConfigError as error:
            store.set("0", REFUSED + str(error))
            raise
        store.set("0", READY)
    return Group(store, here.rank, here.size, host=here.host, backend=backend, timeout_seconds=SHARE_SECONDS)


def refuse(here: Place, message: str) -> None:
    """Tell the others why this rank does not join, if they still listen."""
    if here.rank or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        try:
            _store(10.0).set(str(here.rank), REFUSED + message)
        except RuntimeError:
            pass  # rank 0 has ended


def _store(timeout_seconds: float) -> dist.Store:
    """What the ranks of one run tell each other."""
    rendezvous = dist.rendezvous("env://", timeout=timedelta(seconds=timeout_seconds))
    store, _, _ = next(rendezvous)
    return dist.PrefixStore(f"fedsim/{next(_joined)}", store)


def _check(rank: int, word: str | None, what: str) -> None:
    if word is None:
        raise ConfigError(
            f"runtime.executor: rank {rank} did not join within {JOIN_SECONDS:g} s; start as many processes as "
            "WORLD_SIZE says, on nodes that reach MASTER_ADDR"
        )
    if word.startswith(REFUSED):
        raise ConfigError(f"rank {rank}: {word.removeprefix(REFUSED)}")
    if (other := word.removeprefix(READY)) != what:
        raise ConfigError(
            f"runtime: rank 0 has {what}, and rank {rank} has {other}, so their numbers would differ; set device, "
            "stack and threads, and start at most as many ranks a node as it has GPUs"
        )
