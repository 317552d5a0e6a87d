"""What an update rule is: a frozen dataclass of hyper-parameters, two short formulas and a declaration of its state.

A rule knows nothing of clients, devices, masks, decay or back ends. It says
- `states`: which numbers it keeps, and per what (coordinate, tensor, row or client);
- `coefficients(h, t, q)`: everything that depends on hyper-parameters and the step counter, on the host in float64.
  `h.name` and `t` are Python numbers when all clients agree and arrays [k] when they do not, so write plain arithmetic
  and numpy functions. `q` holds the numbers declared in `host`, to be reassigned there;
- `direction(x, g, s, c, seg)`: the formula. It updates the state in place and returns u, and the core then does
  x -= lr * u. Coefficients `c.name` arrive as Python floats or as [k, 1] tensors: use operators, `lerp_` and `mul`,
  never `alpha=` or `value=`. Neither x nor g may be written to, and a state may be returned as u.

Letters: k clients that step, P coordinates, L tensors, t the client's own step counter (1 at its first step).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
from torch import Tensor

from fedsim.optim.segments import Segments

if TYPE_CHECKING:
    from fedsim.optim.spec import RuleSettings

Hyper = float | tuple[float, ...]  # one number for all clients of the stack, or one per row of it
NEEDS = frozenset(
    {"grad", "half_grads", "sampled_grad", "hvp", "loss_eval", "per_sample_norms", "layer_io", "eval_point"}
)
DECAY_MODES = ("l2", "decoupled", "decoupled_after", "prox", "in_update", "independent")


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


class Rule(Protocol):
    """Base of every rule; the class variables are what a rule may declare, with what holds when it does not.

    Attributes:
        states: what is kept per client on the device.
        host: names of numbers kept per client on the host in float64, zero at first.
        needs: what the training loop must supply, among `NEEDS`.
        inputs: extra tensors in `s`: `noise` (standard normal, keyed by client), or names of `aux` entries.
        elementwise: no coordinate sees another one, so the core may cut the stack anywhere; else whole rows come.
        roles: the tensors this rule is for; the others get the `other` rule of the specification.
        decay: the weight-decay mode that the rule's source uses.
        compiles: torch.compile can take it; not so where the host decides what a step does.
        owns_lr: u already contains the learning rate (`c.lr`), and lr multipliers with it.
        default_lr, default_weight_decay: of the source; None makes the user choose.
    """

    states: ClassVar[tuple[State, ...]] = ()
    host: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[frozenset[str]] = frozenset({"grad"})
    inputs: ClassVar[tuple[str, ...]] = ()
    elementwise: ClassVar[bool] = True
    roles: ClassVar[tuple[str, ...]] = ("matrix", "vector", "embed", "head")
    decay: ClassVar[str] = "l2"
    compiles: ClassVar[bool] = True
    owns_lr: ClassVar[bool] = False
    default_lr: ClassVar[float | None] = None
    default_weight_decay: ClassVar[float] = 0.0

    def active_states(self) -> tuple[State, ...]:
        """The states that these hyper-parameters call for; a subset of `states`."""
        return self.states

    def sized_states(self, seg: Segments) -> tuple[State, ...]:
        """The active states, with their sizes where those follow from the tensors' shapes."""
        return self.active_states()

    def acts_on(self, role: str, shape: tuple[int, ...]) -> bool:
        """Whether a tensor is for this rule and not for the `other` one."""
        return role in self.roles

    def other(self, base: RuleSettings) -> Mapping[str, Any]:
        """The rule, as in the experiment file, of tensors that this one is not for."""
        return {"name": "adamw"}

    def active_inputs(self, t: np.ndarray) -> tuple[str, ...]:
        """Which of `inputs` the step numbered t (per client, [k]) will use."""
        return self.inputs

    def wanted(self, t: np.ndarray) -> frozenset[str]:
        """Which of `needs` the step numbered t (per client, [k]) will use."""
        return self.needs

    def coefficients(self, h: Named, t: Any, q: Named) -> Mapping[str, Any]:
        """Coefficients of this step, floats or [k] arrays, from hyper-parameters, counter and host numbers."""
        return {}

    def direction(self, x: Tensor, g: Tensor, s: Named, c: Named, seg: Segments) -> Tensor:
        """u [k, P] for x -= lr * u, after updating the states in `s`."""
        ...

    def final(self, x: Tensor, s: Named, h: Named) -> Tensor:
        """The point to send and evaluate, [k, P]; x itself unless the rule trains somewhere else."""
        return x

    def eval_point(self, x: Tensor, s: Named, h: Named, t: np.ndarray) -> Tensor:
        """Where the next gradient is to be taken, [k, P]."""
        return x


def check_range(rule: object, low: float, high: float, *names: str, open_high: bool = True) -> None:
    """Refuse hyper-parameters outside [low, high), or [low, high] when `open_high` is false."""
    for name in names:
        value = getattr(rule, name)
        for v in value if isinstance(value, tuple) else (value,):
            if not (low <= v < high or (v == high and not open_high)):
                bracket = ")" if open_high else "]"
                raise ValueError(f"{type(rule).__name__}.{name} must lie in [{low:g}, {high:g}{bracket}, got {v!r}")


def check_choice(rule: object, name: str, choices: tuple[str, ...]) -> None:
    """Refuse a value that is not among the choices."""
    if getattr(rule, name) not in choices:
        raise ValueError(
            f"{type(rule).__name__}.{name} must be one of {', '.join(choices)}; got {getattr(rule, name)!r}"
        )
