"""Vectors that a client keeps for itself from round to round: a personal model, or a part of one.

They begin at the initial model x0, which every client can make by itself and nobody has to send.

Letters: C clients of a stack, H entries of the vector, P of a whole model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedsim.clients.local_training import LocalTraining
from fedsim.cohort import Cohort

KNOWN = "/known"  # how the names of rows end that say whose vectors are there


def x0(clients: Cohort) -> Tensor:
    """[P]: where training starts."""
    return clients.task.init(clients.streams.seed).to(clients.device)


def recalled(clients: Cohort, name: str, start: Tensor) -> Tensor:
    """[C, H]: what these clients kept under a name; `start` [H] for those that never kept anything."""
    rows = clients.memory.read(name, tuple(start.shape), start.dtype)
    known = clients.memory.read(name + KNOWN, ()) > 0
    return torch.where(known[:, None], rows.to(start), start)


def keep(clients: Cohort, name: str, rows: Tensor) -> None:
    """Let these clients keep rows [C, H] under a name, once their replies have been received."""
    clients.memory[name] = rows
    clients.memory[name + KNOWN] = torch.ones(len(clients), device=clients.device)


def check_one_state(local: LocalTraining) -> None:
    """Refuse an optimizer whose state outlives a round, for strategies that train twice with it.

    Raises:
        ValueError: if it does.
    """
    if local.optimizer.state_scope != "round":
        raise ValueError(
            "this strategy trains two models with local.optimizer, and one kept state can't serve both; set "
            "local.optimizer.state_scope: round"
        )
