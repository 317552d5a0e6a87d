"""The optimizer of a stack of clients: any rule of the table on [C, P], with a counter and hyper-parameters per client.

    optimizer = build({"name": "adamw", "lr": 1e-3, "clip": {"global": 1.0}}, layout)
    state = optimizer.init(x)                     # x [C, P]
    optimizer.step_(x[:k], grad[:k], state)       # the first k clients step, the others stay as they are

Order of a step: mask, additive term, l2 decay; clipping and other transforms; state and direction; decoupled decay;
x -= lr * u; decay modes that come after the step; weight average.

Letters: C clients in the stack, k of them step, P coordinates of the trainable vector, t a client's step counter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass, fields
from functools import cached_property
from math import isfinite
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim import pages
from fedsim.optim import native
from fedsim.optim.backends import choose, row_blocks, run, take_rows
from fedsim.optim.parts import make_parts
from fedsim.optim.pipeline import Block, Plan
from fedsim.optim.quick import quick_compiled_, quick_step_
from fedsim.optim.rule import Hyper
from fedsim.optim.schedules import Schedule
from fedsim.optim.segments import Segments
from fedsim.optim.spec import Settings, parse
from fedsim.optim.state import OptState
from fedsim.optim.work import assemble, hypers, named_states
from fedsim.params import Layout
from fedsim.streams import Streams

_WIDTHS: dict[str, Callable[[Segments], int]] = {
    "coordinate": lambda seg: sum(seg.sizes),
    "tensor": lambda seg: len(seg.sizes),
    "row": lambda seg: sum(rows for rows, _ in seg.shapes),
    "column": lambda seg: sum(columns for _, columns in seg.shapes),
    "client": lambda seg: 1,
}


def build(spec: Mapping[str, Any], layout: Layout) -> Optimizer:
    """The optimizer that a section of the experiment file describes.

    Args:
        spec: for example {"name": "adamp", "lr": 1e-3, "clip": {"global": 1.0}}; see `RuleSettings`, `Settings` and the
            rule's own class for the keys.
        layout: of the clients' parameters; its buffers are left out.

    Raises:
        ValueError: unknown rule or key (with the nearest one), wrong type, value out of range.
    """
    parsed = parse(spec)
    layout = layout.trainable
    plan = Plan(make_parts(parsed, layout), parsed.settings, Segments.of(layout))
    _check(plan, layout)
    if parsed.settings.backend == "fused" and not plan.fuses:
        raise ValueError(
            f"optimizer.backend: torch has no fused kernel for {dict(spec)!r}; take auto, eager or compiled"
        )
    return Optimizer(plan, dict(spec), layout)


def _check(plan: Plan, layout: Layout) -> None:
    """Refuse combinations that no single key shows."""
    if plan.settings.dp is not None:
        plan.settings.dp.bounds(layout)
    for part in plan.parts:
        if plan.settings.backend == "compiled" and not part.rule.compiles:
            raise ValueError(f"optimizer.backend: {part.label} has no compiled form; take auto or eager")
        lacking = [s.name for s in part.states if s.code == "exact"]
        if plan.settings.state_scope == "server" and lacking:
            raise ValueError(
                f"optimizer.state_scope: server averages states over clients, and {', '.join(lacking)} of {part.label} "
                "have no mean; take round or client"
            )


@dataclass(frozen=True, eq=False)
class Optimizer:
    """A rule, its settings and the layout it works on; holds no state. Made by `build`."""

    plan: Plan
    spec: Mapping[str, Any]
    layout: Layout

    def __reduce__(self) -> tuple[Any, ...]:
        return build, (self.spec, self.layout)  # travels as its section, without caches on a device

    @property
    def settings(self) -> Settings:
        """Clipping, averaging, multipliers, scope and back end."""
        return self.plan.settings

    @property
    def lr(self) -> Hyper:
        """The main rule's learning rate."""
        return self.plan.parts[0].base.lr

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
        return self._with_gradient(part.rule.needs for part in self.plan.parts)

    @cached_property
    def is_plain_sgd(self) -> bool:
        """Whether a step is x -= lr * g and nothing else, so that an engine may fuse it into the backward pass."""
        part, s = self.plan.parts[0], self.settings
        plain_rule = type(part.rule).__name__ == "Sgd" and not part.rule.active_states()
        clips = any(getattr(s.clip, f.name) is not None for f in fields(s.clip))
        extras = clips or s.perp_grad or s.average or s.gradient_need != "grad"
        return plain_rule and len(self.plan.parts) == 1 and not part.decays and part.lr_weights is None and not extras

    def check_needs(self, available: Set[str]) -> None:
        """Refuse a rule that needs what the task or the training loop cannot supply.

        Raises:
            ValueError: naming what is missing.
        """
        missing = sorted(self.needs - available)
        if missing:
            raise ValueError(
                f"optimizer {self.spec.get('name')!r} needs {', '.join(missing)}, which this task and training loop do "
                f"not supply (they supply {', '.join(sorted(available)) or 'nothing'}); choose another rule"
            )

    def wanted(self, state: OptState, k: int | None = None) -> frozenset[str]:
        """Which of `needs` the next step of the first k clients will use."""
        t = state.t[:k].numpy() + 1
        return self._with_gradient(part.rule.wanted(t) for part in self.plan.parts)

    def _with_gradient(self, needs: Iterable[frozenset[str]]) -> frozenset[str]:
        return (frozenset().union(*needs) - {"grad"}) | {self.settings.gradient_need}

    def init(self, x: Tensor) -> OptState:
        """The state of clients that have not stepped; x [C, P] gives their number, device and type of number."""
        clients, width = x.shape
        assert width == sum(self.plan.segments.sizes), (
            f"optimizer of {sum(self.plan.segments.sizes)} entries got {width}"
        )
        initial: dict[str, float] = {}
        buffers: dict[str, Tensor] = {}
        host: dict[str, Tensor] = {}
        for part in self.plan.parts:
            for state in part.states:
                n = sum(state.per) if isinstance(state.per, tuple) else _WIDTHS[state.per](part.segments)
                dtype = x.dtype if state.dtype is None else getattr(torch, state.dtype)
                shape = (clients, n)
                buffers[part.name + state.name] = pages.apart(x, 1 + len(buffers), shape, state.init, dtype)
                initial[part.name + state.name] = state.init
            for name in part.rule.host:
                host[part.name + name] = torch.zeros(clients, dtype=torch.float64)
        if self.settings.average is not None:
            buffers["average"] = pages.apart(x, 1 + len(buffers), x.shape, 0.0, x.dtype)
        zero = torch.zeros(clients, dtype=torch.int64)
        return OptState(t=zero, skipped=zero.clone(), buffers=buffers, host=host, initial=initial)

    def load(self, rows: Mapping[str, Tensor]) -> OptState:
        """The state saved by `OptState.to_rows`."""
        return OptState.from_rows(rows, self.init(torch.zeros(1, sum(self.plan.segments.sizes))).initial)

    def memory_bytes(self, clients: int = 1) -> int:
        """Bytes of state that C clients take, with parameters in float32."""
        like = torch.zeros(1, sum(self.plan.segments.sizes), device="meta")
        return clients * self.init(like).memory_bytes()

    def step_(
        self,
        x: Tensor,
        grad: Tensor,
        state: OptState,
        *,
        lr_scale: float | Tensor = 1.0,
        aux: Mapping[str, Tensor] | None = None,
        streams: Streams | None = None,
    ) -> None:
        """One step of the first k clients, in place; rows k and beyond of the state are not touched.

        Args:
            x: [k, P], k <= C; rows may have any stride.
            grad: [k, P]; never written to.
            state: of C clients. A client whose gradient is not finite does not step; its `skipped` counts.
            lr_scale: factor on the learning rate, one number or [k] (or more: the first k count).
            aux: `mask` [P] or [k, P] (coordinates at 0 are frozen: no step, no decay, no share in any norm),
                `add` [P] or [k, P] (added to the gradient), and what the rule `needs`.
            streams: of the k clients, for rules with noise.
        """
        k = x.shape[0]
        assert grad.shape == x.shape and k <= state.num_clients, (tuple(x.shape), tuple(grad.shape), state.num_clients)
        if k == 0:
            return
        need = self.settings.gradient_need
        if need != "grad" and need not in (aux or {}):  # an ordinary gradient would pass for a private one
            raise ValueError(f"optimizer: this gradient comes from {need}; take gradient and aux from needs.supply")
        if self.plan.quick and not aux and isinstance(lr_scale, float | int):
            if self.settings.backend == "compiled":
                done = quick_compiled_(self.plan, x, grad, state, lr_scale)
            else:
                done = quick_step_(self.plan, x, grad, state, lr_scale)
            if done:
                if done < k:
                    self.step_(x[done:], grad[done:], state.rows(slice(done, k)), lr_scale=lr_scale)
                return
        t = state.t[:k].numpy()
        host = {name: value[:k].numpy() for name, value in state.host.items()}
        block, host_new = assemble(self.plan, x, state, lr_scale=lr_scale, aux=aux or {}, streams=streams)
        stepped = self._run(x, grad, block)
        t += stepped
        state.skipped[:k] += torch.from_numpy(~stepped)
        for name, value in host_new.items():
            host[name][:] = np.where(stepped, value, host[name])  # views: this writes to the state

    def _run(self, x: Tensor, grad: Tensor, block: Block) -> np.ndarray:
        """[k] bool, the rows that stepped."""
        k, skips = len(x), self.settings.skip_nonfinite
        how = choose(self.plan, x, block)
        left = native.step_(self.plan, x, grad, block, skips) if how == "compiled" else None
        stepped = np.ones(k, dtype=bool)
        if left is not None:
            stepped[left] = False
            return stepped
        for rows in row_blocks(x, how, self.plan.decodes):
            bad = _not_finite(grad[rows]) if skips else None
            if bad is None:
                run(self.plan, how, x[rows], grad[rows], take_rows(block, rows, k))
                continue
            stepped[rows] = ~bad
            for some in _runs(~bad, rows.start):
                run(self.plan, how, x[some], grad[some], take_rows(block, some, k))
        return stepped

    def eval_point(self, x: Tensor, state: OptState) -> Tensor:
        """Where the next gradient is to be taken, [k, P]; x itself for all but shifted rules."""
        part = self.plan.parts[0]
        k = x.shape[0]
        return part.rule.eval_point(x, named_states(part, state, x), hypers(part, k, 1.0), state.t[:k].numpy() + 1)

    def final(self, x: Tensor, state: OptState) -> Tensor:
        """What to evaluate and send, [k, P]: the averaged weights where there are any, else x itself."""
        k = x.shape[0]
        if self.settings.average is not None:
            begun = (state.t[:k] > 0).to(x.device)[:, None]
            return torch.where(begun, state.buffers["average"][:k], x)
        part = self.plan.parts[0]
        if len(self.plan.parts) > 1:  # rules that train somewhere else are elementwise and stand alone
            return x
        result = part.rule.final(x, named_states(part, state, x), hypers(part, k, 1.0))
        return result if result is x else torch.where((state.t[:k] > 0).to(x.device)[:, None], result, x)


def _not_finite(grad: Tensor) -> np.ndarray | None:
    """[k] bool, which rows hold an entry that is not finite; None if none does (the cheap answer)."""
    if isfinite(grad.sum().item()):
        return None
    bad = ~torch.isfinite(grad).all(1)  # a sum of large entries may overflow: look closer
    return bad.cpu().numpy() if bool(bad.any()) else None


def _runs(keep: np.ndarray, start: int) -> list[slice]:
    """The runs of consecutive rows that are kept, numbered from `start`."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], keep, [False]])))
    return [slice(start + int(a), start + int(b)) for a, b in edges.reshape(-1, 2)]
