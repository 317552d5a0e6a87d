"""The optimizer of a stack of clients: any rule of the table on [C, P], with a counter and hyper-parameters per client.

    optimizer = build({"name": "adamw", "lr": 1e-3, "clip": {"global": 1.0}}, layout)
    state = optimizer.init(x)                     # x [C, P]
    optimizer.step_(x[:k], grad[:k], state)       # the first k clients step, the others stay as they are

Order of a step: l2 decay; clipping and other transforms; state and direction; decoupled decay;
x -= lr * u; decay modes that come after the step; weight average.

Letters: C clients in the stack, k of them step, P coordinates of the trainable vector, t a client's step counter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fedsim import pages
from fedsim.config import at
from fedsim.optim.assemble import assemble, named_states, rule_of
from fedsim.optim.backends import FUSED, choose_backend
from fedsim.optim.groups import Recipe, make_groups
from fedsim.optim.rule import Hyper
from fedsim.optim.schedules import Schedule
from fedsim.optim.segments import Segments
from fedsim.optim.settings import Settings
from fedsim.optim.spec import parse
from fedsim.optim.state import OptState
from fedsim.params import Layout
from fedsim.streams import Streams


def build(spec: Mapping[str, Any], layout: Layout, *, key: str = "optimizer") -> Optimizer:
    """The optimizer that a section of the experiment file describes.

    Args:
        spec: for example {"name": "adamp", "lr": 1e-3, "clip": {"global": 1.0}}; see `RuleSettings`, `Settings` and the
            rule's own class for the keys.
        layout: of the clients' parameters; its buffers are left out.
        key: of the section in its file, for messages.

    Raises:
        ConfigError: unknown rule or key (with the nearest one), wrong type, value out of range.
    """
    parsed, layout = parse(spec, key), layout.trainable
    with at(key):
        recipe = Recipe(make_groups(parsed, layout), parsed.settings, Segments.of(layout))
        _check(recipe, layout)
    return Optimizer(recipe, dict(spec), layout)


def _check(recipe: Recipe, layout: Layout) -> None:
    """Refuse combinations that no single key shows."""
    settings = recipe.settings
    if settings.dp is not None:
        settings.dp.bounds(layout)
    if settings.backend == "fused" and not FUSED.has_kernel(recipe):
        raise ValueError("backend: torch has no fused kernel for this rule and these settings; take auto or eager")
    for group in recipe.groups:
        if settings.backend == "compiled" and group.rule.reach == "matrix":
            raise ValueError(f"backend: {group.label} has no compiled form; take auto or eager")
        lacking = [s.name for s in group.states if s.code == "exact"]
        if settings.state_scope == "server" and lacking:
            raise ValueError(
                f"state_scope: server averages states over clients, and {', '.join(lacking)} of {group.label} "
                "have no mean; take round or client"
            )


@dataclass(frozen=True, eq=False)
class Optimizer:
    """A rule, its settings and the layout it works on; holds no state. Made by `build`."""

    recipe: Recipe
    spec: Mapping[str, Any]
    layout: Layout

    def __reduce__(self) -> tuple[Any, ...]:
        return build, (self.spec, self.layout)  # travels as its section, without caches on a device

    @property
    def settings(self) -> Settings:
        """Clipping, averaging, multipliers, scope and back end."""
        return self.recipe.settings

    @property
    def lr(self) -> Hyper:
        """The main rule's learning rate."""
        return self.recipe.groups[0].base.lr

    @property
    def schedule(self) -> Schedule | None:
        """The factor to pass as `lr_scale`, where one was asked for."""
        return self.settings.schedule

    @property
    def state_scope(self) -> str:
        """How long the state lives: round, client or server."""
        return self.settings.state_scope

    @cached_property
    def needs(self) -> frozenset[str]:
        """What the training loop must be able to supply."""
        return self._with_gradient(group.rule.needs for group in self.recipe.groups)

    @cached_property
    def is_plain_sgd(self) -> bool:
        """Whether a step is x -= lr * g and nothing else, so that an engine may fuse it into the backward pass."""
        return self.momentum == 0

    @cached_property
    def momentum(self) -> float | None:
        """The momentum, if a step is m = momentum * m + g, x -= lr * m and nothing else (0: plain SGD); else None."""
        first, s = self.recipe.groups[0], self.settings
        bare = self.recipe.alone and s.clip.value is None and s.average is None and s.gradient_need == "grad"
        return first.rule.heavy_ball if bare and not first.decays and first.lr_weights is None else None

    @property
    def state_bytes(self) -> int:
        """Memory of one client's state, in float32."""
        return sum(t.nbytes for t in self.init(torch.empty(1, self.layout.size, device="meta")).buffers.values())

    def wanted(self, state: OptState, k: int | None = None) -> frozenset[str]:
        """Which of `needs` the next step of the first k clients will use."""
        t = state.t[:k].numpy() + 1
        return self._with_gradient(group.rule.wanted(t) for group in self.recipe.groups)

    def _with_gradient(self, needs: Iterable[frozenset[str]]) -> frozenset[str]:
        return (frozenset().union(*needs) - {"grad"}) | {self.settings.gradient_need}

    def init(self, x: Tensor) -> OptState:
        """The state of clients that have not stepped; x [C, P] gives their number, device and type of number."""
        clients, width = x.shape
        assert width == self.layout.size, f"optimizer of {self.layout.size} entries got {width}"
        buffers: dict[str, Tensor] = {}
        for group in self.recipe.groups:
            for state, n in zip(group.states, group.widths, strict=True):
                dtype = x.dtype if state.dtype is None else getattr(torch, state.dtype)
                buffers[group.name + state.name] = pages.apart(x, 1 + len(buffers), (clients, n), state.init, dtype)
        if self.settings.average is not None:
            buffers["average"] = pages.apart(x, 1 + len(buffers), x.shape, 0.0, x.dtype)
        names = [group.name + name for group in self.recipe.groups for name in group.rule.host]
        host = {name: torch.zeros(clients, dtype=torch.float64) for name in names}
        zero = torch.zeros(clients, dtype=torch.int64)
        return OptState(t=zero, skipped=zero.clone(), buffers=buffers, host=host)

    def step_(
        self,
        x: Tensor,
        grad: Tensor,
        state: OptState,
        *,
        lr_scale: float | Tensor = 1.0,
        aux: Mapping[str, Tensor] | None = None,
        streams: Streams | None = None,
        doubt: Tensor | None = None,
    ) -> None:
        """One step of the first k clients, in place; rows k and beyond of the state are not touched.

        Args:
            x: [k, P], k <= C; rows may have any stride.
            grad: [k, P]; never written to.
            state: of C clients. A client whose gradient is not finite does not step; its `skipped` counts.
            lr_scale: factor on the learning rate, one number or [k] (or more: the first k count).
            aux: what the rule `needs` beside the gradient.
            streams: of the k clients, for rules with noise.
            doubt: [] on x's device, zero before the first step, for who does not want to wait for each step: where that
                takes a wait no gradient is looked at, all step, and this number ends up not finite if one of them was
                not. None looks at once.
        """
        k = x.shape[0]
        assert grad.shape == x.shape and k <= state.num_clients, (tuple(x.shape), tuple(grad.shape), state.num_clients)
        if k == 0:
            return
        need = self.settings.gradient_need
        if need != "grad" and need not in (aux or {}):  # an ordinary gradient would pass for a private one
            raise ValueError(f"optimizer: this gradient comes from {need}; take gradient and aux from needs.supply")
        block, after = assemble(self.recipe, x, state, lr_scale=lr_scale, aux=aux or {}, streams=streams)
        block.doubt = doubt
        left = choose_backend(self.recipe, x, block).step(self.recipe, x, grad, block)
        state.advance(k, left, after)

    def backend_on(self, device: torch.device) -> str:
        """The name of the back end that an ordinary step of float32 parameters takes on a device; may compile it."""
        x = torch.zeros(1, self.layout.size, device=device)
        state, one = self.init(x), torch.zeros(1, dtype=torch.int64)
        state.t += 1  # what a first step has of its own is over
        aux = {name: x for group in self.recipe.groups for name in group.rule.inputs}
        block, _ = assemble(self.recipe, x, state, lr_scale=1.0, aux=aux, streams=Streams(0, one, one))
        return choose_backend(self.recipe, x, block).name

    def final(self, x: Tensor, state: OptState) -> Tensor:
        """What to evaluate and send, [k, P]: the averaged weights where there are any, else x itself."""
        group, k = self.recipe.groups[0], len(x)
        if self.settings.average is not None:
            result = state.buffers["average"][:k]
        elif len(self.recipe.groups) > 1:  # rules that train somewhere else are elementwise and stand alone
            return x
        else:
            result = rule_of(group, k).final(x, named_states(group, state, x))
        return result if result is x else torch.where((state.t[:k] > 0).to(x.device)[:, None], result, x)
