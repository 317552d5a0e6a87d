"""Any `torch.optim` class, or the user's own of that kind, as a local optimizer: one instance per client.

    local: {optimizer: {name: "torch.optim:Rprop", lr: 0.01}}

It steps one client after the other, so it is slow on stacks; the rules of the table are batched. Its state lives for
one round.

Letters: C clients of a stack, k of them step, P trainable entries.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedsim.optim.schedules import Schedule
from fedsim.params import Layout
from fedsim.streams import Streams


@dataclass
class ForeignState:
    """Each client's own optimizer and the tensors it steps.

    Args:
        optimizers: one per client.
        parameters: {name: tensor} of each client, copies of its row.
        skipped: [C] steps left out because a gradient was not finite.
    """

    optimizers: list[torch.optim.Optimizer]
    parameters: list[dict[str, Tensor]]
    skipped: Tensor


@dataclass(frozen=True, eq=False)
class ForeignOptimizer:
    """A class of torch optimizers, used like a rule of the core.

    Args:
        make: (parameters, **arguments) -> torch.optim.Optimizer.
        arguments: its hyper-parameters.
        layout: of the clients' parameters; its buffers are left out, here and in the field.
    """

    make: Callable[..., torch.optim.Optimizer]
    arguments: Mapping[str, Any]
    layout: Layout
    schedule: ClassVar[Schedule | None] = None
    state_scope: ClassVar[str] = "round"
    is_plain_sgd: ClassVar[bool] = False
    momentum: ClassVar[None] = None
    needs: ClassVar[frozenset[str]] = frozenset()
    state_bytes: ClassVar[int] = 0  # torch's classes make theirs in the first step

    def __post_init__(self) -> None:
        object.__setattr__(self, "layout", self.layout.trainable)
        probe = [torch.zeros(1, requires_grad=True)]
        try:
            made = self.make(probe, **self.arguments)
        except TypeError as e:
            raise ValueError(f"{_name(self.make)} can't be made with {dict(self.arguments)}: {e}") from e
        if not isinstance(made, torch.optim.Optimizer):
            raise ValueError(f"{_name(self.make)} gave a {type(made).__name__}, not a torch.optim.Optimizer")
        closure = inspect.signature(made.step).parameters.get("closure")
        if closure is not None and closure.default is closure.empty:
            raise ValueError(f"{_name(self.make)} evaluates the loss within a step, and here it gets a gradient alone")

    @property
    def lr(self) -> Any:
        """The learning rate, where there is one."""
        return self.arguments.get("lr", 1.0)

    def init(self, x: Tensor) -> ForeignState:
        """Fresh optimizers of C clients at x [C, P]."""
        parameters = [{k: v.clone().requires_grad_() for k, v in self.layout.views(row).items()} for row in x.detach()]
        optimizers = [self.make(list(p.values()), **self.arguments) for p in parameters]
        return ForeignState(optimizers, parameters, torch.zeros(len(x), dtype=torch.int64))

    def step_(
        self,
        x: Tensor,
        grad: Tensor,
        state: ForeignState,
        *,
        lr_scale: float | Tensor = 1.0,
        aux: Mapping[str, Tensor] | None = None,
        streams: Streams | None = None,
        doubt: Tensor | None = None,
    ) -> None:
        """One step of the first k clients, x [k, P] in place; see `Optimizer.step_`."""
        if doubt is not None:
            doubt.add_(grad.sum())
        finite = [True] * len(x) if doubt is not None else torch.isfinite(grad).all(1).tolist()
        for i, steps in enumerate(finite):
            if not steps:
                state.skipped[i] += 1
                continue
            rows, grads = self.layout.views(x[i]), self.layout.views(grad[i])
            for name, parameter in state.parameters[i].items():
                parameter.data.copy_(rows[name])
                parameter.grad = grads[name].clone()
            state.optimizers[i].step()
            for name, parameter in state.parameters[i].items():
                rows[name].copy_(parameter.detach())

    def final(self, x: Tensor, state: ForeignState) -> Tensor:
        """x."""
        return x


def _name(make: Callable[..., Any]) -> str:
    return f"{getattr(make, '__module__', '?')}:{getattr(make, '__qualname__', make)}"
