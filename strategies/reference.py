"""The reference point of MASHA: w, at which everybody knows F(w) and every client its own F_m(w).

With a batch_size it is VR-MASHA, whose clients take the difference F_m(z_half) - F_m(w) on one minibatch of theirs;
with a cohort_size it is PP-MASHA, where so many clients, drawn in every step, send one. All clients hear every step,
and all of them send F_m(w), over all of their data, at a refresh.

Letters: C clients of a stack, P entries; z the iterate, F the mean of the clients' operators F_m.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor

from fedsim.clients.oracle import full_gradient, gradient
from fedsim.cohort import Cohort
from fedsim.compress.packet import Compressor
from fedsim.compress.sender import Sender
from fedsim.compress.sparsify import Identity
from fedsim.config import FromTable
from fedsim.fleet import Cost, Fleet, choose
from fedsim.memory import MemoryRows
from fedsim.strategies.descent import ONE_MEAN
from fedsim.strategies.saddle import OWN_STEP, check_lr
from fedsim.strategies.server import NO_ROUNDS, UNIFORM
from fedsim.strategy import Strategy, Traits
from fedsim.streams import Streams

SERVER = -1  # the server's place among client ids, for its compressor's random numbers
NOTHING_UP = Cost(steps=0, bits_up=0)


@dataclass(frozen=True)
class State:
    """x: [P], the iterate z; w: [P], the reference; fw: [P], F(w); round: iterations so far; kept: of the server's last
    packet, for the next."""

    x: Tensor
    w: Tensor
    fw: Tensor
    round: int = 0
    kept: Mapping[str, Tensor] = field(default_factory=dict)


S = TypeVar("S", bound=State)


@dataclass(frozen=True, kw_only=True)
class Referring(Strategy):
    """Extragradient on compressed differences to a reference point, which is refreshed at random.

    Args:
        lr: gamma.
        p: probability of a refresh, about the compression ratio; 1 with no compression is extragradient.
        batch_size: samples of a client's difference to the reference; null for all of its data.
        cohort_size: clients that send a difference in a step; null for all.
        compressor: of every client.
        server_compressor: of the server.
    """

    lr: float
    p: float = 0.1
    batch_size: int | None = None
    cohort_size: int | None = None
    compressor: Annotated[Compressor, FromTable("compressor", "identity")] = Identity()
    server_compressor: Annotated[Compressor, FromTable("compressor", "identity")] = Identity()
    traits: ClassVar[Traits] = Traits(
        needs_all="every client follows every step, and sends its operator at a refresh",
        refused=OWN_STEP | ONE_MEAN | NO_ROUNDS,
    )

    def __post_init__(self) -> None:
        check_lr(self.lr)
        if not 0 < self.p <= 1:
            raise ValueError(f"p, the chance of a refresh, must lie in (0, 1], got {self.p}")
        for name in ("batch_size", "cohort_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, or null for all, got {value}")

    def at_work(self, num_clients: int) -> int:
        return num_clients if self.cohort_size is None else self.cohort_size

    def cohort(self, fleet: Fleet, rng: np.random.Generator) -> Tensor:
        """[S] clients that send a difference in this step."""
        return choose(fleet.clients, self.cohort_size, rng)

    def begun(self, s: S, fleet: Fleet) -> S:
        """The state with the common start as the reference, at first."""
        return s if s.round else replace(s, w=s.x, fw=self.refresh(fleet, s.x))

    def moved(self, s: S, z: Tensor, b: bool, fleet: Fleet) -> S:
        """The state at the new iterate z [P], which is the new reference if b."""
        s = replace(s, x=z, round=s.round + 1)
        return replace(s, w=z, fw=self.refresh(fleet)) if b else s

    def refresh(self, fleet: Fleet, z: Tensor | None = None) -> Tensor:
        """F(w) [P], after w moved to z: clients send F_m(w) in full, and get F(w) in full.

        Args:
            fleet: the clients.
            z: [P], the common start; None once every client has its z.
        """
        fw = fleet.ask(fleet.clients, self.full, fold=UNIFORM, z=z)["f"]
        fleet.ask(fleet.clients, self.keep, cost=NOTHING_UP, fw=fw)
        return fw

    # Client halves

    def full(self, clients: Cohort, z: Tensor | None) -> dict[str, Tensor]:
        """w <- z at every client, and F_m(w) [C, P] there, kept and sent."""
        if z is not None:  # the common start
            clients.memory["z"] = z.expand(len(clients), -1)
        clients.memory["w"] = w = clients.memory["z"]
        clients.memory["f_m"] = f = full_gradient(clients, w)
        return {"f": f}

    def keep(self, clients: Cohort, fw: Tensor) -> dict[str, Tensor]:
        """F(w) [P] at every client."""
        clients.memory["fw"] = fw.expand(len(clients), -1)
        return {}

    def half_point(self, clients: Cohort) -> Tensor:
        """[C, P]: z_bar - gamma * F(w), from what every client keeps."""
        z, w, fw = clients.memory["z"], clients.memory["w"], clients.memory["fw"]
        return (1 - self.p) * z + self.p * w - self.lr * fw

    def from_reference(self, clients: Cohort, z: Tensor) -> Tensor:
        """[C, P]: F_m(z) - F_m(w) at z [C, P], over all data or on one and the same minibatch."""
        if self.batch_size is None:
            return full_gradient(clients, z) - clients.memory["f_m"]
        here, there = gradient(clients, z, clients.memory["w"], batch_size=self.batch_size)
        return here - there


def server_sender(x: Tensor, round: int, rng: np.random.Generator, kept: Mapping[str, Tensor]) -> Sender:
    """The server as the sender of one row in a round, on the device of x [P]; takes one draw of rng.

    What it keeps of its last packet it finds in `kept`, and what of this one is in its `memory.written` then.
    """
    seed = int(rng.integers(1 << 62))
    streams = Streams(seed, torch.tensor([SERVER], device=x.device), torch.tensor([round], device=x.device))
    return Sender(streams, MemoryRows(kept, 1, len(x), x.device), "server")
