"""Which of the processes of a torchrun this one is; known without torch, since every command asks.

Letters: W ranks.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True)
class Place:
    """This process among those of a torchrun.

    Args:
        rank: of all processes; local_rank: of those on this machine.
        size: W; local_size: processes on this machine.
        host: where the store of the ranks is.
    """

    rank: int
    local_rank: int
    size: int
    local_size: int
    host: str


def place() -> Place | None:
    """This process's place, None if no torchrun started it."""
    env = os.environ
    if not {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} <= env.keys():
        return None
    return Place(
        rank=int(env["RANK"]),
        local_rank=int(env["LOCAL_RANK"]),
        size=int(env["WORLD_SIZE"]),
        local_size=int(env.get("LOCAL_WORLD_SIZE", "1")),
        host=env["MASTER_ADDR"],
    )


def follows() -> bool:
    """Whether another process runs the loop, prints and writes."""
    here = place()
    return here is not None and here.rank > 0


@cache
def take_gpu(here: Place) -> None:
    """Let this process see the GPU of its local rank alone; before CUDA starts, and once, whatever it runs."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = None if visible is None else [name for name in visible.split(",") if name]
    if names is None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(here.local_rank)
    elif len(names) > 1 or here.local_size > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(names[here.local_rank : here.local_rank + 1])
