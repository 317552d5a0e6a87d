"""What a strategy is to the rest of the program: two methods, and traits that are declared, never asked for by name.

Letters: N clients in all, C of a stack, P parameters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
from torch import Tensor

from fedsim.cohort import Cohort
from fedsim.compress.packet import Compressor
from fedsim.config import ConfigError
from fedsim.fleet import Fleet, TooFewRows
from fedsim.graph import Graph
from fedsim.metrics import plain_numbers
from fedsim.params import Layout
from fedsim.task import Constants

LocalRules = Literal["any", "momentum_sgd", "scheduled_sgd", "plain_sgd", "rate"]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Traits:
    """What goes with a strategy, and why not what does not.

    Args:
        local_rules: the local optimizers that it bears: any; momentum_sgd, SGD with momentum or without, at one rate
            a round, since it knows how far these go; scheduled_sgd, at one rate a round, or plain_sgd, at one rate for
            good, since it changes the direction of every step and divides by the rate; rate, a rate and its schedule
            alone, since it takes one step itself.
        two_points: whether a step looks at the gradient at a point other than the local model and the run's start, so
            that steps are taken one by one.
        averages_state: whether it sends and averages the local optimizer's state (`state_scope: server`).
        bears_weights: whether what it makes of replies is right for any weights of them, so that a selection may weigh
            each by its chance to be drawn (`Selection.weighs`).
        own_models: whether clients have models of their own in the end (`Strategy.personal_model`).
        bears_buffers: whether models may have entries that no gradient moves (BatchNorm).
        no_late: why a reply to what was sent in an earlier round is of no use to it (`late: keep`); None where it is.
        needs_all: why every client must take part in every step, so that none may be away or drop out; None where
            those do that can.
        no_links: why nobody may compress what goes to and from its server; None where that works.
        refused: {key of the section `strategy` that others have: why this one has not}.
    """

    local_rules: LocalRules = "any"
    two_points: bool = False
    averages_state: bool = False
    bears_weights: bool = False
    own_models: bool = False
    bears_buffers: bool = True
    no_late: str | None = None
    needs_all: str | None = None
    no_links: str | None = None
    refused: Mapping[str, str] = field(default_factory=dict)


Combine = Callable[[Tensor, Tensor], Tensor]
"""Rows [R, P] and sample counts [R] of their clients -> [P]."""
Mix = Callable[[Tensor, Graph], Tensor]
"""Vectors sent [M, P], and who of C peers heard which -> [C, P]."""


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

    def check_fleet(self, fleet: Fleet, x: Tensor, /) -> None:  # noqa: B027
        """Refuse clients with which the first round could not begin.

        Args:
            fleet: the clients.
            x: [P], of what they are sent, whose size alone counts.

        Raises:
            ValueError: if there are too few, or something is not known of them that must be.
        """

    def replies(self, num_clients: int) -> int:
        """Replies of N clients that it takes at a time, at most."""
        return self.at_work(num_clients)

    def needed(self, num_clients: int) -> int:
        """Clients of N without whose replies it never takes a step."""
        return 1

    def combining(self) -> Combine | None:
        """How it makes one vector of those that arrive together, as an attacker reckons who knows; None if it doesn't.

        What comes of it raises TooFewRows for fewer rows than it can judge.
        """
        return None

    def mixing(self) -> Mix | None:
        """What each peer makes of the vectors that it hears, for such an attacker; None where there are no peers."""
        return None

    def personal_model(self, clients: Cohort, x: Tensor, /) -> Tensor:
        """[C, P]: the models that these clients would use themselves, now that the server has x [P]."""
        return x.expand(len(clients), -1)

    def tuned(self, clients: Cohort, y: Tensor, epochs: int) -> Tensor:
        """[C, P]: models y [C, P] after some epochs on the clients' own samples, of which nothing is remembered."""
        raise AssertionError("a strategy without local training and a server is not asked")

    def own_scores(self, clients: Cohort, x: Tensor, epochs: int) -> dict[str, Tensor]:
        """A client half beside the rounds: how clients' own models do on samples that they hold out.

        Args:
            clients: who.
            x: [P], the server's model.
            epochs: of tuning before.

        Returns:
            {"examples": [C], "personal_loss", "global_loss", ...: [C]}, of the clients' own models and of x.
        """
        y = self.personal_model(clients, x)
        own = clients.task.evaluate_own(clients.ids, self.tuned(clients, y, epochs) if epochs else y)
        given = clients.task.evaluate_own(clients.ids, x.expand(len(clients), -1))
        both = {f"personal_{k}": v for k, v in own.items()} | {f"global_{k}": v for k, v in given.items()}
        return {"examples": own["examples"]} | {k: v for k, v in both.items() if not k.endswith("_examples")}

    def proven(self, constants: Constants, num_entries: int) -> tuple[float, float] | None:
        """(its step, the largest with which its theory has it converge) on vectors of P entries; None if unknown."""
        return None

    def sent(self, layout: Layout) -> Layout:
        """What travels of a client's whole vector: by its size bits are counted, and for it links compress."""
        return layout


def begin(strategy: Strategy, x0: Tensor) -> Any:
    """The state before the first round, from the model x0 [P].

    Raises:
        ConfigError: if it holds no model.
    """
    return _checked(strategy.init(x0), f"{type(strategy).__name__}.init")


def step(strategy: Strategy, state: Any, fleet: Fleet, rng: np.random.Generator) -> tuple[Any, dict[str, Any]]:
    """One round: (new state, metrics); with fewer replies than it can judge no model moves, and it says so.

    Raises:
        ConfigError: if it returned something else.
    """
    try:
        made = strategy.round(state, fleet, rng)
    except TooFewRows as e:
        return state if e.state is None else e.state, {"too_few": 1}
    whose = f"{type(strategy).__name__}.round"
    if not isinstance(made, tuple) or len(made) != 2 or not isinstance(made[1], Mapping):
        parts = "a pair" if isinstance(made, tuple) and len(made) == 2 else f"a {type(made).__name__}"
        raise ConfigError(f"{whose} returned {parts}; return (state, metrics), metrics {{}} where there are none")
    return _checked(made[0], whose), plain_numbers(made[1], whose)


def _checked(state: Any, whose: str) -> Any:
    if not isinstance(getattr(state, "x", None), Tensor):
        made = f"{whose} returned a {type(state).__name__}"
        raise ConfigError(f"{made}; return a dataclass whose field x is the server's model [P]")
    return state


def fields_of(strategy: Strategy, kind: type[T]) -> dict[str, T]:
    """{field: value} of the hyper-parameters of one type."""
    return {name: value for name, value in vars(strategy).items() if isinstance(value, kind)}


def compressors(strategy: Strategy) -> dict[str, Compressor]:
    """{field: value} of the compressors that a strategy brings along."""
    return {name: value for name, value in vars(strategy).items() if isinstance(value, Compressor)}
