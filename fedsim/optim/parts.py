"""Which rule acts on which coordinates, and the factors on learning rate and decay there.

A matrix rule acts on the hidden matrices; every role it is not for gets the `other` rule, and a role named in `roles`
gets its own. Parts that share a rule and settings are one part; a part that does not cover the whole vector works on
its own coordinates packed together, so its states take no room for the rest.

Letters: P coordinates of the whole vector, p those of a part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from fnmatch import fnmatch

import torch
from torch import Tensor

from fedsim.optim.decode import suggest
from fedsim.optim.pipeline import Part
from fedsim.optim.rule import Rule
from fedsim.optim.segments import Segments
from fedsim.optim.spec import Parsed, RuleSettings
from fedsim.optim.storage import make_storage
from fedsim.params import ROLES, Layout


def make_parts(parsed: Parsed, layout: Layout) -> tuple[Part, ...]:
    """The parts of a layout, the main rule's first; parts without a tensor are left out."""
    owners: dict[str, list[int]] = {}
    for i, role in enumerate(layout.roles):
        if role in parsed.roles:
            owner = role
        else:
            owner = "main" if parsed.rule.acts_on(role, layout.shapes[i]) else "other"
        owners.setdefault(owner, []).append(i)
    rules: Mapping[str, tuple[Rule, RuleSettings]] = {
        "main": (parsed.rule, parsed.base),
        "other": parsed.other,
        **parsed.roles,
    }
    order = [name for name in rules if name in owners]
    if not order:
        raise ValueError("the optimizer has nothing to train: the layout has no trainable tensor")
    alone = len(order) == 1
    return tuple(_part(name, rules[name], owners[name], alone, parsed, layout) for name in order)


def _part(
    name: str, ruled: tuple[Rule, RuleSettings], tensors: list[int], alone: bool, parsed: Parsed, layout: Layout
) -> Part:
    rule, base = ruled
    own = Layout(
        names=tuple(layout.names[i] for i in tensors),
        shapes=tuple(layout.shapes[i] for i in tensors),
        roles=tuple(layout.roles[i] for i in tensors),
    )
    lr = _factors(own, parsed.settings.lr_mult, "lr_mult", layout)
    wd = _factors(own, parsed.settings.wd_mult, "wd_mult", layout)
    if not base.decay_vectors:
        wd = [0.0 if len(shape) < 2 else w for w, shape in zip(wd, own.shapes, strict=True)]
    if base.decay in ("decoupled", "decoupled_after", "prox"):  # the rate is lr * lambda, so lr's factors belong to it
        wd = [w * f for w, f in zip(wd, lr, strict=True)]
    decays = base.weight_decay != 0 and any(wd)
    hyper = {f.name: getattr(rule, f.name) for f in fields(rule)}  # type: ignore[arg-type]
    hyper |= {"lr": base.lr, "weight_decay": base.weight_decay}
    columns = None if alone else _columns(layout, tensors)
    weights = _vector(wd, own.sizes) if decays else None
    segments = Segments.of(own)
    states = rule.sized_states(segments)
    storage = make_storage(parsed.settings.state_dtype, states, segments, own.roles)
    return Part(
        name="" if name == "main" else f"{name}.",
        rule=rule,
        base=base,
        segments=segments,
        states=states if storage is None else storage.stored(),
        storage=storage,
        columns=columns,
        lr_weights=_vector(lr, own.sizes),
        decay_weights=weights,
        l2_weights=weights if columns is None else _spread(weights, columns, own.size, layout.size),
        decays=decays,
        plain_hypers=None if any(isinstance(v, tuple) for v in hyper.values()) else hyper,
    )


def _factors(own: Layout, given: Mapping[str, float] | None, what: str, layout: Layout) -> list[float]:
    """One factor per tensor: of the first matching name pattern, else of the role, else 1."""
    given = dict(given or {})
    for key in given:
        if not any(fnmatch(name, key) for name in layout.names):
            suggest(key, (*ROLES, *layout.names), f"optimizer.{what}", what="role or tensor")
    factors = []
    for name, role in zip(own.names, own.roles, strict=True):
        named = next((f for pattern, f in given.items() if pattern not in ROLES and fnmatch(name, pattern)), None)
        factors.append(float(given.get(role, 1.0) if named is None else named))
    return factors


def _vector(factors: Sequence[float], sizes: Sequence[int]) -> Tensor | None:
    """[1, p], or None when every factor is one."""
    if all(f == 1 for f in factors):
        return None
    return torch.repeat_interleave(torch.tensor(factors, dtype=torch.float64), torch.tensor(sizes))[None]


def _spread(weights: Tensor | None, columns: Tensor, size: int, total: int) -> Tensor:
    full = torch.zeros(1, total, dtype=torch.float64)
    full[0, columns] = torch.ones(size, dtype=torch.float64) if weights is None else weights[0]
    return full


def _columns(layout: Layout, tensors: list[int]) -> Tensor:
    ranges = [torch.arange(layout.offsets[i], layout.offsets[i] + layout.sizes[i]) for i in tensors]
    return torch.cat(ranges)
