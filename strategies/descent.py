"""Descent: a round is one gradient of every client that takes part, and one step of the server.

Letters: C clients of a stack, P parameters; x the model, g an estimate of the mean gradient.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, TypeVar

from torch import Tensor

from fedsim.clients.oracle import gradient_sum
from fedsim.cohort import Cohort
from fedsim.compress.packet import Compressor
from fedsim.compress.sparsify import Identity
from fedsim.config import FromTable
from fedsim.fleet import Cost, Fleet
from fedsim.strategies.server import ServerState, Synchronous
from fedsim.strategy import Strategy, Traits, compressors
from fedsim.terms import Terms

S = TypeVar("S", bound=ServerState)
ONE_MEAN = dict.fromkeys(
    ("aggregator", "pre_aggregators"),
    "it adds means of differences to an earlier mean, which gives the mean of all; what a robust rule makes of "
    "differences does not add up",
)
"""Why a method that sends differences has not these keys of a server."""


@dataclass(frozen=True, kw_only=True)
class Descent(Synchronous):
    """One minibatch of every client and one step a round.

    Args:
        local: gives the batch size that a client adds to a step, and the rate with its schedule.
    """

    traits: ClassVar[Traits] = Traits(local_rules="rate", bears_buffers=False)

    @property
    def cost(self) -> Cost:
        return replace(self.local.cost, steps=1)

    @property
    def lr(self) -> float:
        """The step of the first round."""
        return self.server_lr * self.local.rate_at(0)

    def descend(self, s: S, fleet: Fleet, g: Tensor) -> S:
        """The state after one step along g [P]."""
        return self.step(s, g, self.server_lr * self.local.rate_at(fleet.round))

    def gradient_at(self, clients: Cohort, x: Tensor) -> Terms:
        """[C, P]: gradients at x [P] on one minibatch of every client, the same wherever a job asks for it."""
        total, loss, _ = gradient_sum(clients, x, replace(self.local.schedule, epochs=None, steps=1))
        clients.log(train_loss=loss)
        return total


@dataclass(frozen=True, kw_only=True)
class CompressedDescent(Descent):
    """Descent along an estimate of the mean gradient that compressed differences of the clients keep up to date.

    Args:
        compressor: of every client.
    """

    compressor: Annotated[Compressor, FromTable("compressor", "identity")] = Identity()
    traits: ClassVar[Traits] = replace(Descent.traits, refused=ONE_MEAN)

    @property
    def cost(self) -> Cost:
        return replace(super().cost, bits_up=self.compressor.bits(self.local.num_trainable))


def check_unbiased(strategy: Strategy, instead: str) -> None:
    """Refuse a biased compressor among the fields of a strategy.

    Args:
        strategy: whose.
        instead: the strategy that bears one.

    Raises:
        ValueError: naming the field.
    """
    for name, compressor in compressors(strategy).items():
        if not compressor.unbiased:
            raise ValueError(
                f"{name} {compressor} is biased, and {type(strategy).__name__.lower()} goes elsewhere with it, or "
                f"diverges; use an unbiased one (rand_k, qsgd, natural) or strategy {instead}, which bears it"
            )


def unbiased_omega(compressor: Compressor, num_entries: int) -> float:
    """omega of a compressor that `check_unbiased` let pass."""
    omega = compressor.omega(num_entries)
    assert omega is not None
    return omega
