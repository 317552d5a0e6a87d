"""Which rule acts on which coordinates, and the factors on learning rate and decay there.

A matrix rule acts on the hidden matrices; every role it is not for gets the `other` rule, and a role named in `roles`
gets its own. Tensors that share a rule and settings are one parameter group; a group that does not cover the whole
vector works on its own coordinates packed together, so its states take no room for the rest.

Letters: P coordinates of the whole vector, p those of a group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from fnmatch import fnmatch
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fedsim.config import did_you_mean
from fedsim.optim.rule import Rule, RuleSettings, State
from fedsim.optim.segments import Segments
from fedsim.optim.settings import Settings
from fedsim.optim.spec import Parsed, Ruled
from fedsim.optim.storage import Storage, make_storage
from fedsim.params import ROLES, Layout

Values = dict[str, Any]  # [k, w], [1, w] or [k, 1] tensors, numbers that all clients share, or None
Factors = tuple[float, ...]  # one a tensor


@dataclass(frozen=True, eq=False)
class ParamGroup:
    """One rule and the coordinates it acts on.

    Args:
        name: prefix of its state buffers; empty for the main rule.
        rule: what it computes.
        base: learning rate and decay.
        segments: of its own packed coordinates [p].
        states: the buffers that are kept for it.
        widths: of each buffer.
        storage: how they stand for the rule's states; None if they are those.
        columns: [p] int64, its coordinates in the whole vector; None means all of them in order.
        lr_factors: one for each of its tensors, on the learning rate; None means 1 everywhere.
        decay_factors: the same, on the decay rate.
        l2_factors: the same of all tensors of the whole vector, zero outside this group.
        whole: segments of the whole vector [P].
        decays: whether any coordinate decays at all.
    """

    name: str
    rule: Rule
    base: RuleSettings
    segments: Segments
    states: tuple[State, ...]
    widths: tuple[int, ...]
    storage: Storage | None
    columns: Tensor | None
    lr_factors: Factors | None
    decay_factors: Factors | None
    l2_factors: Factors | None
    whole: Segments
    decays: bool
    _constants: dict[object, Values] = field(default_factory=dict, repr=False)

    @property
    def mode(self) -> str | None:
        """The decay mode, or None if nothing decays."""
        return self.base.decay if self.decays else None

    @property
    def label(self) -> str:
        """How messages call it."""
        return f"optimizer.{self.name}{type(self.rule).__name__}"

    @cached_property
    def per_client(self) -> bool:
        """Whether some hyper-parameter is given one per client."""
        return any(isinstance(getattr(self.rule, f.name), tuple) for f in fields(self.rule))  # type: ignore[arg-type]

    def weights(self, x: Tensor) -> Values:
        """The factors of each coordinate on x's device and in its type, made once: [1, p], of l2 decay [1, P].

        A step that is told where each factor begins needs no vectors of the model's size, so they are made for others.
        """
        key = (x.device, x.dtype)
        if key not in self._constants:
            decay = _vector(self.decay_factors, self.segments, x)
            self._constants[key] = {
                "lr_weights": _vector(self.lr_factors, self.segments, x),
                "decay_weights": decay,
                "l2_weights": decay if self.columns is None else _vector(self.l2_factors, self.whole, x),
            }
        return self._constants[key]

    def own_columns(self, x: Tensor) -> Tensor | None:
        """Its columns on x's device, moved there once."""
        if self.columns is None:
            return None
        if x.device not in self._constants:
            self._constants[x.device] = {"columns": self.columns.to(x.device)}
        found: Tensor = self._constants[x.device]["columns"]
        return found


@dataclass(frozen=True, eq=False)
class Recipe:
    """What is fixed about a step: the parameter groups, the transforms and the tensors of the whole vector."""

    groups: tuple[ParamGroup, ...]
    settings: Settings
    segments: Segments
    compiled: dict[object, Any] = field(default_factory=dict, repr=False)  # steps that back ends have compiled

    @property
    def decodes(self) -> bool:
        """Whether some states are decoded for each step."""
        return any(group.storage is not None for group in self.groups)

    @cached_property
    def alone(self) -> bool:
        """Whether no coordinate sees another one: one rule on the whole vector, its states kept as they are."""
        first, s = self.groups[0], self.settings
        single = len(self.groups) == 1 and first.storage is None
        return single and first.rule.reach == "coordinate" and s.perp_grad is None and not s.clip.whole_rows


def make_groups(parsed: Parsed, layout: Layout) -> tuple[ParamGroup, ...]:
    """The groups of a layout, the main rule's first; groups without a tensor are left out."""
    owners: dict[str, list[int]] = {}
    for i, role in enumerate(layout.roles):
        owner = "main" if parsed.main[0].acts_on(role, layout.shapes[i]) else "other"
        owners.setdefault(role if role in parsed.roles else owner, []).append(i)
    rules: Mapping[str, Ruled] = {"main": parsed.main, "other": parsed.other, **parsed.roles}
    order = [name for name in rules if name in owners]
    if not order:
        raise ValueError("the optimizer has nothing to train: the layout has no trainable tensor")
    return tuple(_group(name, rules[name], owners[name], len(order) == 1, parsed.settings, layout) for name in order)


def _group(name: str, ruled: Ruled, tensors: list[int], alone: bool, settings: Settings, layout: Layout) -> ParamGroup:
    rule, base = ruled
    own = Layout(
        names=tuple(layout.names[i] for i in tensors),
        shapes=tuple(layout.shapes[i] for i in tensors),
        roles=tuple(layout.roles[i] for i in tensors),
    )
    lr = _factors(own, settings.lr_mult, "lr_mult", layout)
    wd = _factors(own, settings.wd_mult, "wd_mult", layout)
    if not base.decay_vectors:
        wd = [0.0 if len(shape) < 2 else w for w, shape in zip(wd, own.shapes, strict=True)]
    if base.decay in ("decoupled", "decoupled_after", "prox"):  # the rate is lr * lambda, so lr's factors belong to it
        wd = [w * f for w, f in zip(wd, lr, strict=True)]
    decays = base.weight_decay != 0 and any(wd)
    columns = None if alone else _columns(layout, tensors)
    owned = dict(zip(tensors, wd, strict=True))
    segments = Segments.of(own)
    states = rule.sized_states(segments)
    storage = make_storage(settings.state_dtype, states, segments, own.roles)
    states = states if storage is None else storage.stored()
    return ParamGroup(
        name="" if name == "main" else f"{name}.",
        rule=rule,
        base=base,
        segments=segments,
        states=states,
        widths=tuple(sum(s.per) if isinstance(s.per, tuple) else segments.width(s.per) for s in states),
        storage=storage,
        columns=columns,
        lr_factors=_unless_one(lr),
        decay_factors=_unless_one(wd) if decays else None,
        l2_factors=_unless_one([owned.get(i, 0.0) for i in range(len(layout.names))]) if decays else None,
        whole=Segments.of(layout),
        decays=decays,
    )


def _factors(own: Layout, given: Mapping[str, float] | None, what: str, layout: Layout) -> list[float]:
    """One factor per tensor: of the first matching name pattern, else of the role, else 1."""
    given = dict(given or {})
    for key in given:
        if key not in (known := (*ROLES, *layout.names)) and not any(fnmatch(name, key) for name in layout.names):
            raise ValueError(f"{what}: unknown role or tensor {key!r}{did_you_mean(key, known)}")
    factors = []
    for name, role in zip(own.names, own.roles, strict=True):
        named = next((f for pattern, f in given.items() if pattern not in ROLES and fnmatch(name, pattern)), None)
        factors.append(float(given.get(role, 1.0) if named is None else named))
    return factors


def _unless_one(factors: Sequence[float]) -> Factors | None:
    """The factors, or None when every one is one."""
    return None if all(f == 1 for f in factors) else tuple(factors)


def _vector(factors: Factors | None, segments: Segments, like: Tensor) -> Tensor | None:
    """[1, p]: each tensor's factor at each of its coordinates."""
    if factors is None:
        return None
    runs = zip(torch.tensor(factors, dtype=like.dtype), segments.sizes, strict=True)
    return torch.cat([factor.expand(size) for factor, size in runs])[None].to(like.device)


def _columns(layout: Layout, tensors: list[int]) -> Tensor:
    ranges = [torch.arange(layout.offsets[i], layout.offsets[i] + layout.sizes[i]) for i in tensors]
    return torch.cat(ranges)
