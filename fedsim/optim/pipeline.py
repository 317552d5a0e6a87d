"""One step on a block of rows: the order of section "a step" for every rule, written once.

Gradient inputs (mask, additive term, l2 decay), gradient transforms, the rule's state and direction, decay, the step,
decay modes that come after it, the weight average. The same function runs eagerly on blocks that fit a core's cache
and, compiled, on the whole stack.

Letters: k clients, P coordinates of the trainable vector, p those of one part.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fedsim.optim.fused import has_kernel
from fedsim.optim.rule import Named, Rule, State
from fedsim.optim.segments import Segments
from fedsim.optim.spec import RuleSettings, Settings
from fedsim.optim.storage import Storage
from fedsim.optim.transforms import needs_whole_rows, transform

Values = dict[str, Any]  # [k, w], [1, w] or [k, 1] tensors, numbers that all clients share, or None


@dataclass(frozen=True, eq=False)
class Part:
    """One rule and the coordinates it acts on.

    Args:
        name: prefix of its state buffers; empty for the main rule.
        rule: what it computes.
        base: learning rate and decay.
        segments: of its own packed coordinates [p].
        states: the buffers that are kept for it.
        storage: how they stand for the rule's states; None if they are those.
        columns: [p] int64, its coordinates in the whole vector; None means all of them in order.
        lr_weights: [1, p] factors on the learning rate; None means 1 everywhere.
        decay_weights: [1, p] factors on the decay rate; None means 1 everywhere.
        l2_weights: [1, P] the same over the whole vector, zero outside this part; None means 1 everywhere.
        decays: whether any coordinate decays at all.
        plain_hypers: the rule's hyper-parameters if all are plain numbers, else None.
    """

    name: str
    rule: Rule
    base: RuleSettings
    segments: Segments
    states: tuple[State, ...]
    storage: Storage | None
    columns: Tensor | None
    lr_weights: Tensor | None
    decay_weights: Tensor | None
    l2_weights: Tensor | None
    decays: bool
    plain_hypers: Mapping[str, Any] | None
    _constants: dict[object, Values] = field(default_factory=dict, repr=False)

    @property
    def mode(self) -> str | None:
        """The decay mode, or None if nothing decays."""
        return self.base.decay if self.decays else None

    @property
    def label(self) -> str:
        """How messages call it."""
        return f"optimizer.{self.name}{type(self.rule).__name__}"

    def constants(self, x: Tensor) -> Values:
        """Weight vectors and columns on x's device and in its type, made once."""
        key = (x.device, x.dtype)
        if key not in self._constants:
            vectors = {n: getattr(self, n) for n in ("lr_weights", "decay_weights", "l2_weights")}
            self._constants[key] = {n: None if v is None else v.to(x.device, x.dtype) for n, v in vectors.items()}
            self._constants[key]["columns"] = None if self.columns is None else self.columns.to(x.device)
        return self._constants[key]

    def undecayed(self, x: Tensor) -> Tensor | None:
        """[n] int64 columns that do not decay, if they are few and all others decay at one rate; else None."""
        key = ("undecayed", x.device)
        if key not in self._constants:
            assert self.decay_weights is not None
            weights = self.decay_weights[0]
            zero = (weights == 0).nonzero()[:, 0]
            fits = bool(((weights == 0) | (weights == 1)).all()) and len(zero) <= len(weights) // 8
            self._constants[key] = {"columns": zero.to(x.device) if fits else None}
        found: Tensor | None = self._constants[key]["columns"]
        return found

    def decay_factor(self, x: Tensor, rate: float) -> Tensor:
        """[1, p] 1 - rate * weight in x's type, rounded once."""
        key = ("decay factor", x.device, x.dtype)
        known = self._constants.get(key)
        if known is None or known["rate"] != rate:
            assert self.decay_weights is not None
            factor = (1 - self.decay_weights * rate).to(x.device, x.dtype)
            known = self._constants[key] = {"rate": rate, "factor": factor}
        made: Tensor = known["factor"]
        return made


@dataclass(frozen=True, eq=False)
class Plan:
    """What is fixed about a step: the parts, the transforms and the tensors of the whole vector."""

    parts: tuple[Part, ...]
    settings: Settings
    segments: Segments

    @cached_property
    def kernels(self) -> dict[object, Any]:
        """Compiled steps, kept by `native`."""
        return {}

    @property
    def decodes(self) -> bool:
        """Whether some states are decoded for each step."""
        return any(part.storage is not None for part in self.parts)

    @cached_property
    def elementwise(self) -> bool:
        """Whether no coordinate sees another one: one rule on the whole vector, its states kept as they are."""
        part = self.parts[0]
        alone = len(self.parts) == 1 and part.storage is None
        return alone and part.rule.elementwise and not needs_whole_rows(self.settings)

    @cached_property
    def quick(self) -> bool:
        """Whether a step may go the short way: one kernel, numbers that all clients share, nothing else."""
        s, part = self.settings, self.parts[0]
        plain = s.average is None and s.gradient_need == "grad" and part.plain_hypers is not None
        if s.backend == "compiled":
            return plain and self.elementwise and not part.rule.inputs
        return plain and self.fuses and s.backend in ("auto", "fused")

    @cached_property
    def fuses(self) -> bool:
        """Whether torch has a kernel for this rule with these settings (per-client numbers and masks aside)."""
        part, clip = self.parts[0], self.settings.clip
        simple = len(self.parts) == 1 and part.lr_weights is None and clip.value is None and part.storage is None
        decay = part.mode in (None, "decoupled") or (part.mode == "l2" and part.decay_weights is None)
        return simple and decay and not needs_whole_rows(self.settings) and has_kernel(part.rule)


@dataclass
class Block:
    """Everything one step needs about some rows.

    Args:
        shared: mask, add, average and average_keep, where present.
        states: per part, its states, inputs and weight vectors.
        coefs: per part, its coefficients.
    """

    shared: Values
    states: list[Values]
    coefs: list[Values]


def step_block_(plan: Plan, x: Tensor, g: Tensor, block: Block) -> None:
    """One step of every row of x [k, P], in place, with gradients g [k, P]."""
    mask = _tensor(block.shared, "mask")
    if "average_first" in block.shared:  # the average starts at the point the client starts from
        average = block.shared["average"]
        average.lerp_(x, block.shared["average_first"])
    g = _gradient(plan, x, g, block, mask)
    for part, states, coefs in zip(plan.parts, block.states, block.coefs, strict=True):
        s, c = Named(states), Named(coefs)
        if part.columns is None:
            _advance_(part, x, g, s, c, mask)
            continue
        own = x.index_select(1, states["columns"])
        picked = None if mask is None else mask.index_select(1, s.columns)
        _advance_(part, own, g.index_select(1, s.columns), s, c, picked)
        x.index_copy_(1, s.columns, own)
    if "average" in block.shared:
        block.shared["average"].lerp_(x, block.shared["average_rate"])


def _gradient(plan: Plan, x: Tensor, g: Tensor, block: Block, mask: Tensor | None) -> Tensor:
    """The gradient that the rules see: mask, additive term, l2 decay, transforms."""
    if mask is not None:
        g = g * mask
        x = x * mask
    if "add" in block.shared:
        add = block.shared["add"]
        g = g + (add if mask is None else add * mask)
    for part, states, coefs in zip(plan.parts, block.states, block.coefs, strict=True):
        if part.mode == "l2":
            weights = _tensor(states, "l2_weights")
            g = g + x * coefs["decay_rate"] if weights is None else g + x * (weights * coefs["decay_rate"])
    return transform(x, g, plan.segments, plan.settings)


def _advance_(part: Part, x: Tensor, g: Tensor, s: Named, c: Named, mask: Tensor | None) -> None:
    """State, direction, decay and step of one part on its own coordinates."""
    rule, mode = part.rule, part.mode
    lr_weights, decay_weights = s.lr_weights, s.decay_weights
    if mask is not None:
        decay_weights = mask if decay_weights is None else decay_weights * mask
    lr = c.lr
    if rule.owns_lr and lr_weights is not None:
        c.lr = lr * lr_weights
    if rule.decay == "in_update":
        rate = c.decay_rate if mode == "in_update" else 0.0
        c.decay = rate if decay_weights is None else rate * decay_weights
    if part.storage is not None:
        part.storage.decode_(s, x)
    u = rule.direction(x if mask is None else x * mask, g, s, c, part.segments)
    if part.storage is not None:
        part.storage.encode_(s)
    if mask is not None:
        u = u * mask
    if mode in ("decoupled", "independent"):
        _shrink_(x, c.decay_rate, decay_weights)
    if rule.owns_lr:
        x.sub_(u)
    else:
        _descend_(x, u if lr_weights is None else u * lr_weights, lr)
    if mode == "decoupled_after":
        _shrink_(x, c.decay_rate, decay_weights)
    elif mode == "prox":
        x.div_(1 + (c.decay_rate if decay_weights is None else c.decay_rate * decay_weights))


def _shrink_(x: Tensor, rate: Tensor | float, weights: Tensor | None) -> None:
    """x *= 1 - rate * weights."""
    if weights is None:
        x.mul_(1 - rate)
    elif isinstance(rate, Tensor):
        x.sub_(x * weights * rate)
    else:
        x.addcmul_(x, weights, value=-rate)


def _descend_(x: Tensor, u: Tensor, lr: Tensor | float) -> None:
    """x -= lr * u."""
    if isinstance(lr, Tensor):
        x.sub_(u * lr)
    else:
        x.add_(u, alpha=-lr)


def _tensor(values: Mapping[str, Any], name: str) -> Tensor | None:
    value = values.get(name)
    assert value is None or isinstance(value, torch.Tensor)
    return value
