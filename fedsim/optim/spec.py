"""An optimizer's section of the experiment file, decoded strictly into typed, checked objects.

One flat mapping holds a rule's own hyper-parameters and the settings every rule shares (`RuleSettings`, `Settings`).
Types, names and the errors about them are the experiment file's (`fedsim.config`), so every message carries its key.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, cast

from torch import Tensor

from fedsim.config import ConfigError, Kinds, decode, did_you_mean, named
from fedsim.optim.rule import Rule, RuleSettings
from fedsim.optim.settings import Settings
from fedsim.optim.table import INNER, RULES
from fedsim.params import ROLES

Ruled = tuple[Rule, RuleSettings]


@dataclass(frozen=True, kw_only=True)
class Parsed:
    """A decoded section: the main rule, rules of single roles, the rule of roles the main one is not for."""

    main: Ruled
    settings: Settings
    roles: Mapping[str, Ruled]
    other: Ruled


def parse(spec: Mapping[str, Any], key: str) -> Parsed:
    """Decode an optimizer's section.

    Raises:
        ConfigError: an unknown rule or key, a value of the wrong type or out of range.
    """
    spec = {k: _plain(v) for k, v in spec.items()}
    roles, other = spec.pop("roles", None) or {}, spec.pop("other", None)
    shared = [f.name for f in fields(Settings)]
    preset = {} if spec.get("name") not in RULES else RULES[spec["name"]].settings or {}
    common = {**preset, **{k: spec.pop(k) for k in shared if k in spec}}
    main = parse_rule(spec, key, also=(*shared, "roles", "other"))
    for role in roles:
        if role not in ROLES:
            raise ConfigError(f"{key}.roles.{role}: unknown role{did_you_mean(str(role), ROLES)}")
    follows = main[0].other(main[1])
    if other is not None or follows is None:
        follows = parse_rule(other or {"name": "adamw"}, f"{key}.other")
    return Parsed(
        main=main,
        settings=_settings(common, key),
        roles={role: parse_rule(section, f"{key}.roles.{role}") for role, section in roles.items()},
        other=follows,
    )


def is_rule(made: object) -> bool:
    """Whether this is a rule's class, the user's own among them."""
    return isinstance(made, type) and Rule in made.__mro__


def parse_rule(spec: Any, key: str, also: tuple[str, ...] = ()) -> Ruled:
    """A rule with its hyper-parameters, and its `RuleSettings`."""
    cls: Any
    cls, name, given = named({n: entry.rule for n, entry in RULES.items()}, spec, key)
    if not is_rule(cls):
        raise ConfigError(
            f"{key}.name: {name!r} is no rule of the core; derive from fedsim.optim.Rule, or take another"
        )
    values = {**((RULES[name].preset or {}) if name in RULES else {}), **given}
    own = [f.name for f in fields(RuleSettings)]
    hyper = [f.name for f in fields(cls)]
    for k in values:
        if k not in (known := [*hyper, *own, *also]):
            raise ConfigError(f"{key}.{k}: unknown key{did_you_mean(str(k), known)}")
    rule = decode(cls, {k: v for k, v in values.items() if k in hyper}, key, KINDS)()
    defaults = {"lr": cls.default_lr, "weight_decay": cls.default_weight_decay, "decay": cls.decay}
    common = defaults | {k: v for k, v in values.items() if k in own}
    if common["lr"] is None:
        raise ConfigError(f"{key}.lr: missing; {name} has no customary learning rate")
    base = decode(RuleSettings, common, key)()
    if base.decay == "in_update" != cls.decay:
        raise ConfigError(f"{key}.decay: {name} does not put the decay into its update; take {cls.decay}")
    return rule, base


def _settings(values: dict[str, Any], key: str) -> Settings:
    if isinstance(clip := values.get("clip"), Mapping):  # `global` is no name that a field can have
        known = ["value", "adaptive", "tensor", "global"]
        for k in clip:
            if k not in known:
                raise ConfigError(f"{key}.clip.{k}: unknown key{did_you_mean(str(k), known)}")
        values["clip"] = {("norm" if k == "global" else k): v for k, v in clip.items()}
    elif clip is None:
        values.pop("clip", None)
    else:
        raise ConfigError(f"{key}.clip: write {{global: {clip}}}, or value, adaptive or tensor, got {clip!r} alone")
    if isinstance(perp := values.get("perp_grad"), bool):
        values["perp_grad"] = {} if perp else None
    return cast("Settings", decode(Settings, values, key)())


def _inner_rule(value: Any, key: str, kinds: Kinds) -> Rule:
    """The elementwise rule that works inside a low-rank one."""
    cls, name, given = named({name: RULES[name].rule for name in INNER}, value, key)
    hyper = [f.name for f in fields(cls)]
    preset = {k: v for k, v in (RULES[name].preset or {}).items() if k in hyper}
    rule = cast("Rule", decode(cls, {**preset, **given}, key)())
    for f in fields(cls):
        if isinstance(getattr(rule, f.name), tuple):
            raise ConfigError(f"{key}.{f.name}: must be one number for all clients")
    return rule


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) else value


KINDS: Kinds = {"inner_rule": _inner_rule}
