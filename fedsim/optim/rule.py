"""What an update rule is: a frozen dataclass of hyper-parameters, two short formulas and a declaration of its state.

A rule knows nothing of clients, devices, decay or back ends. It says
- `states`: which numbers it keeps, and per what (coordinate, tensor, row or client);
- `coefficients(t, lr, host)`: everything that depends on hyper-parameters and the step counter, on the host in float64.
  `t`, `lr` and the fields of `self` are Python numbers where all clients agree and arrays [k] where they do not, so
  write plain arithmetic and numpy functions. `host` holds the numbers declared in `host`, to be reassigned there;
- `direction(x, g, s, c, seg)`: the formula. It updates the states `s.name` in place and returns u, and the core then
  does x -= lr * u. Coefficients `c.name` arrive as Python floats or as [k, 1] tensors: use operators, `lerp_` and
  `mul`, never `alpha=` or `value=`. Neither x nor g may be written to, and a state may be returned as u.

Letters: k clients that step, P coordinates, L tensors, t the client's own step counter (1 at its first step).
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol, TypeAlias

import numpy as np
from torch import Tensor

from fedsim.hints import Within
from fedsim.optim.segments import Segments

Hyper = float | tuple[float, ...]  # one number for all clients of the stack, or one per row of it
if TYPE_CHECKING:  # in a rule's arithmetic it is a number or an array [k] (`of_clients`)
    Beta: TypeAlias = Any
    Share: TypeAlias = Any
    Size: TypeAlias = Any
else:
    Beta = Annotated[Hyper, Within(0, 1)]
    Share = Annotated[Hyper, Within(0, 1, closed=True)]
    Size = Annotated[Hyper, Within(0, float("inf"))]
Fixed = Annotated[float, Within(0, float("inf"))]  # the same for all clients
Whole = Annotated[int, Within(0, float("inf"))]
Count = Annotated[int, Within(1, float("inf"))]
Decay = Literal["l2", "decoupled", "decoupled_after", "prox", "in_update", "independent"]
Reach = Literal["coordinate", "tensor", "matrix"]


class Named:
    """Values by attribute, in a form that torch.compile can follow."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            setattr(self, name, value)

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

        def __setattr__(self, name: str, value: Any) -> None: ...


@dataclass(frozen=True)
class State:
    """One state of a rule, a buffer [C, width].

    Args:
        name: its attribute in `direction`'s `s`.
        per: `coordinate`, `tensor`, `row` (of each matrix viewed as [rows, columns]), `column`, or `client`;
            or how many numbers each tensor has (`sized_states`).
        init: the number that a fresh client's state is filled with.
        dtype: torch's name of its type; None means the parameters' own.
        code: `exact` for bases and indices, that bear no rounding by `state_dtype` and have no mean over clients.
    """

    name: str
    per: str | tuple[int, ...] = "coordinate"
    init: float = 0.0
    dtype: str | None = None
    code: str | None = None


@dataclass(frozen=True, kw_only=True)
class RuleSettings:
    """What every rule has, and a role's own rule may set for itself.

    Args:
        lr: learning rate, one number or one per client.
        weight_decay: lambda; its meaning is `decay`'s.
        decay: `l2` (into the gradient), `decoupled` (x *= 1 - lr * wd, before the step), `decoupled_after`, `prox`
            (x /= 1 + lr * wd, after), `in_update` (the rule puts it into u), `independent` (x *= 1 - wd * schedule).
        decay_vectors: decay tensors of one dimension or none too (biases and norm gains are left alone otherwise).
    """

    lr: Size
    weight_decay: Size = 0.0
    decay: Decay = "l2"
    decay_vectors: bool = False


class Rule(Protocol):
    """Base of every rule; the class variables are what a rule may declare, with what holds when it does not.

    Hyper-parameters of the names under `Args` are in every rule what is said here, unless it says something else.

    Args:
        momentum: share of the momentum m that a step keeps.
        dampening: share of each gradient that m does not take.
        nesterov: step as if m had taken this gradient once more.
        beta1: share of m, the running mean of gradients, that a step keeps.
        beta2: share of v, the running mean of squared gradients, that a step keeps.
        eps: added to the root in the denominator.
        amsgrad: divide by the largest v so far.
        warmup: steps over which the learning rate rises from zero.
        interval: steps between two resets of the moments.
        every: steps between two refreshes of the curvature h, the first of which is a client's first step (k).
        raw: take the rule of the authors' package instead of the paper's.

    Attributes:
        states: what is kept per client on the device.
        host: names of numbers kept per client on the host in float64, zero at first.
        needs: what the training loop must supply (`needs.py`): `grad`, and names among `inputs`.
        inputs: extra tensors in `s`: `noise` (standard normal, keyed by client), or names of `aux` entries.
        reach: what decides u at a coordinate. The `coordinate` alone: the core may cut the stack anywhere, and compile
            the step into one loop. Its whole `tensor` or client: whole rows come. `matrix` products or the host: the
            same, and the step has no compiled form.
        roles: the tensors this rule is for; the others get the `other` rule of the specification.
        decay: the weight-decay mode that the rule's source uses.
        owns_lr: u already contains the learning rate (`c.lr`), and lr multipliers with it.
        default_lr, default_weight_decay: of the source; None makes the user choose.
    """

    states: ClassVar[tuple[State, ...]] = ()
    host: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[frozenset[str]] = frozenset({"grad"})
    inputs: ClassVar[tuple[str, ...]] = ()
    reach: ClassVar[Reach] = "coordinate"
    roles: ClassVar[tuple[str, ...]] = ("matrix", "vector", "embed", "head")
    decay: ClassVar[Decay] = "l2"
    owns_lr: ClassVar[bool] = False
    default_lr: ClassVar[float | None] = None
    default_weight_decay: ClassVar[float] = 0.0

    @property
    def heavy_ball(self) -> float | None:
        """The momentum, if u is m = momentum * m + g and nothing else (0: the gradient itself); else None."""
        return None

    def of_clients(self, k: int) -> Rule:
        """The rule of a stack's first k clients: arrays [k] in place of hyper-parameters given one per client."""
        given = {f.name: v for f in fields(self) if isinstance(v := getattr(self, f.name), tuple)}  # type: ignore[arg-type]
        if not given:
            return self
        made = copy(self)
        vars(made).update({name: per_client(name, v, k) for name, v in given.items()})
        return made

    def active_states(self) -> tuple[State, ...]:
        """The states that these hyper-parameters call for; a subset of `states`."""
        return self.states

    def sized_states(self, seg: Segments) -> tuple[State, ...]:
        """The active states, with their sizes where those follow from the tensors' shapes."""
        return self.active_states()

    def acts_on(self, role: str, shape: tuple[int, ...]) -> bool:
        """Whether a tensor is for this rule and not for the `other` one."""
        return role in self.roles

    def other(self, base: RuleSettings) -> tuple[Rule, RuleSettings] | None:
        """The rule of tensors that this one is not for, if it follows from this one; else they get AdamW."""
        return None

    def active_inputs(self, t: np.ndarray) -> tuple[str, ...]:
        """Which of `inputs` the step numbered t (per client, [k]) will use."""
        return self.inputs

    def wanted(self, t: np.ndarray) -> frozenset[str]:
        """Which of `needs` the step numbered t (per client, [k]) will use."""
        return self.needs & {"grad", *self.active_inputs(t)}

    def coefficients(self, t: Any, lr: Any, host: Named) -> Mapping[str, Any]:
        """Coefficients of this step, floats or [k] arrays, from hyper-parameters, counter and host numbers."""
        return {}

    def direction(self, x: Tensor, g: Tensor, s: Named, c: Named, seg: Segments) -> Tensor:
        """u [k, P] for x -= lr * u, after updating the states in `s`.

        g may hold numbers that are not finite. Such a client's step is not kept, but nothing here may raise for them.
        """
        ...

    def final(self, x: Tensor, s: Named) -> Tensor:
        """The point to send and evaluate, [k, P]; x itself unless the rule trains somewhere else."""
        return x


def per_client(name: str, value: Hyper, k: int) -> Any:
    """A number, or [k] float64 of numbers given one per client."""
    if not isinstance(value, tuple):
        return value
    if len(value) < k:
        raise ValueError(f"optimizer.{name} has {len(value)} numbers for a stack of {k} clients; give one per client")
    return np.array(value[:k])
