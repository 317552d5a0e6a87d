"""Any rule of the table as a real `torch.optim.Optimizer`, for a device or an ordinary training loop.

A parameter group is a stack of one client: its parameters are copied to one flat row [1, P], stepped, and copied back.
Param groups, closures, learning-rate schedulers and `state_dict` work as usual.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedsim.optim.core import Optimizer, build
from fedsim.optim.spec import parse
from fedsim.optim.state import OptState
from fedsim.params import Layout
from fedsim.streams import Streams

_STATE = "stack"


def torch_optimizer(
    name: str, params: Iterable[Any], *, seed: int = 0, roles: Mapping[int, str] | None = None, **hyper: Any
) -> torch.optim.Optimizer:
    """A rule of the table on ordinary parameters.

    >>> w = nn.Parameter(torch.ones(2, 2))
    >>> optimizer = torch_optimizer("lion", [w], lr=0.1, weight_decay=0.0)
    >>> w.grad = torch.tensor([[1.0, -2.0], [0.0, 3.0]])
    >>> optimizer.step()
    >>> w.data
    tensor([[0.9000, 1.1000],
            [1.0000, 0.9000]])

    Args:
        name: of the rule.
        params: parameters, (name, parameter) pairs, or param groups, each with its own hyper-parameters.
        seed: of the noise that some rules draw.
        roles: {id(parameter): role} for embeddings and the head; others are `matrix` or `vector` by their shape.
        hyper: any key of an optimizer's section of the experiment file. As there, tensors of one dimension are
            decayed only with `decay_vectors=True` (torch's own optimizers decay them always).

    Raises:
        ValueError: unknown rule or key, value out of range, or a rule that needs more than a gradient.
    """
    parsed = parse({"name": name, **hyper}, name)
    rule, base = parsed.main
    missing = (rule.needs | {parsed.settings.gradient_need}) - {"grad"}
    if missing:
        raise ValueError(f"torch_optimizer({name!r}): the rule needs {', '.join(sorted(missing))}, not only a gradient")
    defaults = {"lr": base.lr, "weight_decay": base.weight_decay, **hyper, "rule": name}
    return StackOptimizer(params, defaults, seed, dict(roles or {}))


class StackOptimizer(torch.optim.Optimizer):
    """What `torch_optimizer` returns. State sits at the first parameter of each group, whole for the group.

    A parameter without a gradient neither moves nor decays in that step, but its running means see a zero gradient.
    """

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any], seed: int, roles: dict[int, str]) -> None:
        self._seed, self._roles, self._keys = seed, roles, tuple(k for k in defaults if k != "rule")
        self._built: dict[int, tuple[Any, Optimizer]] = {}
        super().__init__(params, defaults)
        for index in range(len(self.param_groups)):
            self._optimizer(index)  # a bad value of a group is refused here and not at its first step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every group; the closure, if any, is evaluated first and its loss returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for index, group in enumerate(self.param_groups):
            if any(p.grad is not None for p in group["params"]):
                self._step_group(index, group["params"])
        return loss

    def _step_group(self, index: int, params: list[nn.Parameter]) -> None:
        optimizer, lr_scale = self._optimizer(index)
        x = torch.cat([p.detach().reshape(-1) for p in params])[None]
        grad = torch.cat([torch.zeros_like(p).view(-1) if p.grad is None else p.grad.reshape(-1) for p in params])[None]
        state = self._load(optimizer, params[0], x)
        ids = torch.tensor([index])
        streams = Streams(self._seed, ids, torch.zeros_like(ids))
        optimizer.step_(x, grad, state, lr_scale=lr_scale, streams=streams)
        for p, value in zip(params, x[0].split([p.numel() for p in params]), strict=True):
            if p.grad is not None:
                p.copy_(value.view_as(p))
        rows = state.to_rows()
        self.state[params[0]][_STATE] = {n: v.tolist() if v.dtype == torch.float64 else v for n, v in rows.items()}

    def _load(self, optimizer: Optimizer, first: nn.Parameter, x: Tensor) -> OptState:
        saved = self.state[first].get(_STATE)
        if saved is None:
            return optimizer.init(x)
        fresh = optimizer.init(x.to("meta"))  # what the buffers are called and of which type they are
        # load_state_dict casts floating tensors to the parameter's type, so float64 numbers are kept as lists
        rows = {n: torch.tensor(v, dtype=torch.float64) if isinstance(v, list) else v for n, v in saved.items()}
        buffers = {n: rows[n].to(b.dtype) for n, b in fresh.buffers.items()}
        return OptState.from_rows(rows | buffers)

    def _optimizer(self, index: int) -> tuple[Optimizer, float]:
        """A group's optimizer and the factor on its learning rate.

        A learning-rate scheduler only moves the factor; the optimizer is built anew when it changes something else.
        """
        group = self.param_groups[index]
        params = group["params"]
        hyper = {k: float(v) if isinstance(v, Tensor) else v for k, v in group.items() if k in self._keys}
        lr, base = hyper["lr"], group.get("initial_lr", hyper["lr"])
        follows = isinstance(lr, float | int) and base > 0
        hyper["lr"] = float(base) if follows else lr
        roles = tuple(self._roles.get(id(p), "matrix" if p.ndim >= 2 else "vector") for p in params)
        names = tuple(group.get("param_names") or (str(i) for i in range(len(params))))
        shapes = tuple(tuple(p.shape) for p in params)
        key = (sorted(hyper.items(), key=lambda item: item[0]), roles, names, shapes)
        if index not in self._built or self._built[index][0] != key:
            optimizer = build({"name": group["rule"], **hyper}, Layout(names, shapes, roles))
            self._built[index] = (key, optimizer)
        return self._built[index][1], lr / base if follows else 1.0
