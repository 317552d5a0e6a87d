"""The reference point of MASHA: w, at which everybody knows F(w) and every client its own F_m(w).

Letters: C clients of a stack, P entries; z the iterate, F the mean of the clients' operators F_m.
"""

from __future__ import annotations

from torch import Tensor

from fedsim.aggregate import Mean
from fedsim.clients.oracle import full_gradient
from fedsim.cohort import Cohort
from fedsim.fleet import Cost, Fleet, Work

UNIFORM = Mean(weights="uniform")


def refresh(fleet: Fleet, full: Work, keep: Work, z: Tensor | None = None) -> Tensor:
    """F(w) [P], after w moved to z: clients send F_m(w) in full, and get F(w) in full.

    Args:
        full: the client half that calls `move_reference`.
        keep: the client half that calls `keep_mean`.
        z: [P], the common start; None once every client has its z.
    """
    fw = fleet.ask(fleet.clients, full, fold=UNIFORM, z=z)["f"]
    fleet.ask(fleet.clients, keep, cost=Cost(steps=0, bits_up=0), fw=fw)
    return fw


def move_reference(clients: Cohort, z: Tensor | None) -> dict[str, Tensor]:
    """w <- z at every client, and F_m(w) [C, P] there, kept and sent."""
    if z is not None:  # the common start
        clients.memory["z"] = z.expand(len(clients), -1)
    clients.memory["w"] = w = clients.memory["z"]
    clients.memory["f_m"] = f = full_gradient(clients, w)
    return {"f": f}


def keep_mean(clients: Cohort, fw: Tensor) -> dict[str, Tensor]:
    """F(w) [P] at every client."""
    clients.memory["fw"] = fw.expand(len(clients), -1)
    return {}
