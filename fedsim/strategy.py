"""What a strategy is to the rest of the program: two methods, and traits that are declared, never asked for by name.

Letters: N clients in all, P parameters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
from torch import Tensor

from fedsim.compress.packet import Compressor
from fedsim.fleet import Fleet

LocalRules = Literal["any", "plain_sgd", "rate"]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Traits:
    """What goes with a strategy, and why not what does not.

    Args:
        local_rules: the local optimizers that it bears: any; plain_sgd, with one rate, since it changes the direction
            of every step and divides by the rate; rate, a rate and its schedule alone, since it takes one step itself.
        two_points: whether a step looks at the gradient at a point other than the local model and the run's start, so
            that steps are taken one by one.
        averages_state: whether it sends and averages the local optimizer's state (`state_scope: server`).
        bears_buffers: whether models may have entries that no gradient moves (BatchNorm).
        no_links: why nobody may compress what goes to and from its server; None where that works.
        refused: {key of the section `strategy` that others have: why this one has not}.
    """

    local_rules: LocalRules = "any"
    two_points: bool = False
    averages_state: bool = False
    bears_buffers: bool = True
    no_links: str | None = None
    refused: Mapping[str, str] = field(default_factory=dict)


class Strategy(ABC):
    """One algorithm: a frozen dataclass with hyper-parameters as fields, and client halves as methods."""

    traits: ClassVar[Traits] = Traits()

    @abstractmethod
    def init(self, x0: Tensor, /) -> Any:
        """The state before the first round, from the model x0 [P]; its field `x` is the server's model [P]."""

    @abstractmethod
    def round(self, state: Any, fleet: Fleet, rng: np.random.Generator, /) -> tuple[Any, dict[str, Any]]:
        """One server step: (new state, metrics of its own)."""

    def at_work(self, num_clients: int) -> int:
        """Clients of N that work at a time, which the width of a stack is chosen for."""
        return num_clients


def fields_of(strategy: Strategy, kind: type[T]) -> dict[str, T]:
    """{field: value} of the hyper-parameters of one type."""
    return {name: value for name, value in vars(strategy).items() if isinstance(value, kind)}


def compressors(strategy: Strategy) -> dict[str, Compressor]:
    """{field: value} of the compressors that a strategy brings along."""
    return {name: value for name, value in vars(strategy).items() if isinstance(value, Compressor)}
