"""An optimizer's section of the experiment file, decoded strictly into typed, checked objects.

One flat mapping holds a rule's own hyper-parameters and the settings every rule shares (`Settings`); a key that is
neither is an error that suggests the nearest one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from fedsim.optim.decode import decode, suggest
from fedsim.optim.extra import Private, ZerothOrder
from fedsim.optim.rule import DECAY_MODES, Hyper, Rule
from fedsim.optim.schedules import Schedule, schedule_from
from fedsim.optim.storage import STATE_DTYPES
from fedsim.optim.table import RULES, find_rule
from fedsim.params import ROLES

STATE_SCOPES = ("round", "client", "server")
BACKENDS = ("auto", "eager", "fused", "compiled")


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

    lr: Hyper
    weight_decay: Hyper = 0.0
    decay: str = "l2"
    decay_vectors: bool = False

    def __post_init__(self) -> None:
        for name in ("lr", "weight_decay"):
            value = getattr(self, name)
            for v in value if isinstance(value, tuple) else (value,):
                if not 0 <= v < float("inf"):
                    raise ValueError(f"optimizer.{name} must be a finite number >= 0, got {v!r}")
        if self.decay not in DECAY_MODES:
            raise ValueError(f"optimizer.decay must be one of {', '.join(DECAY_MODES)}; got {self.decay!r}")


@dataclass(frozen=True, kw_only=True)
class Clip:
    """Bounds on each client's gradient, applied in this order (transforms.py); none by default.

    Args:
        value: every entry is clamped to [-value, value].
        adaptive: each matrix row's norm stays below this times the norm of the same row of x (AGC).
        tensor: bound on the norm of each tensor.
        norm: bound on the norm over all tensors of a client (`global` in the file).
    """

    value: float | None = None
    adaptive: float | None = None
    tensor: float | None = None
    norm: float | None = None

    def __post_init__(self) -> None:
        for f in fields(self):
            bound = getattr(self, f.name)
            if bound is not None and not bound > 0:
                raise ValueError(f"optimizer.clip.{f.name} must be positive, got {bound!r}; leave it out to not clip")


@dataclass(frozen=True, kw_only=True)
class PerpGrad:
    """The perpendicular-gradient transform; `rescale` restores the gradient's norm, as the authors' file does."""

    rescale: bool = True


@dataclass(frozen=True, kw_only=True)
class Average:
    """Averaging of the weights after each step, and what is sent is the average.

    Args:
        name: `ema` (average = decay * average + (1 - decay) * x) or `swa` (running mean).
        decay: of `ema`, one number or one per client.
    """

    name: str = "ema"
    decay: Hyper = 0.999

    def __post_init__(self) -> None:
        if self.name not in ("ema", "swa"):
            raise ValueError(f"optimizer.average.name must be ema or swa, got {self.name!r}")
        for v in self.decay if isinstance(self.decay, tuple) else (self.decay,):
            if not 0 <= v <= 1:
                raise ValueError(f"optimizer.average.decay must lie in [0, 1], got {v!r}")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What an optimizer has beside its rules.

    Args:
        clip: bounds on the gradient.
        perp_grad: remove the gradient's part along the weights.
        average: average the weights.
        lr_mult, wd_mult: {role or tensor name: factor} on the learning rate and the weight decay; a name counts more
            than a role. Factors on the learning rate scale the decoupled decay too, as in torch's parameter groups.
        schedule: factor on the learning rate over rounds, steps or the fraction of the training that is done.
        state_scope: `round` (state is fresh each round), `client` (kept by the client) or `server` (sent down with the
            model and averaged back). Data for the training loop; the step is the same.
        zeroth_order: take the gradient from losses alone, at points around x.
        dp: clip the samples' gradients and add noise (DP-SGD).
        state_dtype: how the rule's large states are kept: `fp32`, `bf16`, or `dyn8` (8-bit codes in blocks).
        backend: `eager`, `fused` (torch's own kernel), `compiled` (one pass of C++, or torch.compile), or `auto`:
            fused where there is such a kernel, else eager.
        skip_nonfinite: leave out the step of a client whose gradient is not finite, and count it. On a GPU this
            costs one wait per step.
    """

    clip: Clip = Clip()
    perp_grad: PerpGrad | None = None
    average: Average | None = None
    lr_mult: Mapping[str, float] | None = None
    wd_mult: Mapping[str, float] | None = None
    schedule: Schedule | None = None
    zeroth_order: ZerothOrder | None = None
    dp: Private | None = None
    state_scope: str = "round"
    state_dtype: str = "fp32"
    backend: str = "auto"
    skip_nonfinite: bool = True

    def __post_init__(self) -> None:
        if self.state_scope not in STATE_SCOPES:
            raise ValueError(
                f"optimizer.state_scope must be one of {', '.join(STATE_SCOPES)}; got {self.state_scope!r}"
            )
        if self.state_dtype not in STATE_DTYPES:
            raise ValueError(
                f"optimizer.state_dtype must be one of {', '.join(STATE_DTYPES)}; got {self.state_dtype!r}"
            )
        if self.zeroth_order is not None and self.dp is not None:
            raise ValueError("optimizer: zeroth_order and dp both say where the gradient comes from; keep one")
        if self.backend not in BACKENDS:
            raise ValueError(f"optimizer.backend must be one of {', '.join(BACKENDS)}; got {self.backend!r}")

    @property
    def gradient_need(self) -> str:
        """What the training loop must supply for the gradient."""
        if self.zeroth_order is not None:
            return "loss_eval"
        return "grad" if self.dp is None else "per_sample_norms"


@dataclass(frozen=True, kw_only=True)
class Parsed:
    """A decoded section: the main rule, rules of single roles, the rule of roles the main one is not for."""

    rule: Rule
    base: RuleSettings
    settings: Settings
    roles: Mapping[str, tuple[Rule, RuleSettings]]
    other: tuple[Rule, RuleSettings]


def parse(spec: Mapping[str, Any]) -> Parsed:
    """Decode an optimizer's section.

    Raises:
        ValueError: an unknown rule or key, a value of the wrong type or out of range.
    """
    spec = dict(spec)
    roles = spec.pop("roles", None) or {}
    other = spec.pop("other", None)
    shared = {f.name for f in fields(Settings)}
    common = {k: spec.pop(k) for k in list(spec) if k in shared}
    if spec.get("name") in RULES:
        common = {**(RULES[spec["name"]].settings or {}), **common}
    rule, base = parse_rule(spec, "optimizer", also=(*shared, "roles", "other"))
    for role in roles:
        suggest(role, ROLES, "optimizer.roles")
    return Parsed(
        rule=rule,
        base=base,
        settings=_settings(common),
        roles={role: parse_rule(section, f"optimizer.roles.{role}") for role, section in roles.items()},
        other=parse_rule(other or rule.other(base), "optimizer.other"),
    )


def parse_rule(spec: Mapping[str, Any], where: str, also: Sequence[str] = ()) -> tuple[Rule, RuleSettings]:
    """Decode a rule's name, its hyper-parameters and its `RuleSettings`."""
    spec = dict(spec)
    if "name" not in spec:
        raise ValueError(f"{where} needs a `name`, for example {{name: sgd, lr: 0.1}}; got {spec!r}")
    cls, preset = find_rule(spec.pop("name"), where)
    spec = {**preset, **spec}
    own = {f.name for f in fields(RuleSettings)}
    common = {k: spec.pop(k) for k in list(spec) if k in own}
    rule = decode(cls, spec, where, also=(*own, *also))
    if "lr" not in common and cls.default_lr is None:
        raise ValueError(f"{where}.lr is missing: {cls.__name__} has no customary learning rate")
    defaults = {"lr": cls.default_lr, "weight_decay": cls.default_weight_decay, "decay": cls.decay}
    base = decode(RuleSettings, defaults | common, where)
    if cls.owns_lr and base.decay == "in_update" and cls.decay != "in_update":
        raise ValueError(f"{where}.decay: in_update is not defined for {cls.__name__}; take decoupled")
    if base.decay == "in_update" and cls.decay != "in_update":
        raise ValueError(f"{where}.decay: {cls.__name__} does not put the decay into its update; take {cls.decay}")
    return rule, base


def _settings(common: dict[str, Any]) -> Settings:
    clip = common.get("clip")
    if clip is not None and not isinstance(clip, Clip):
        renamed = {("norm" if k == "global" else k): v for k, v in dict(clip).items()}
        common["clip"] = decode(Clip, renamed, "optimizer.clip", also=("global",))
    elif clip is None:
        common.pop("clip", None)
    perp = common.get("perp_grad")
    if isinstance(perp, bool):
        common["perp_grad"] = PerpGrad() if perp else None
    elif isinstance(perp, Mapping):
        common["perp_grad"] = decode(PerpGrad, perp, "optimizer.perp_grad")
    if isinstance(common.get("average"), Mapping):
        common["average"] = decode(Average, common["average"], "optimizer.average")
    for name, cls in (("zeroth_order", ZerothOrder), ("dp", Private)):
        if isinstance(common.get(name), Mapping):
            common[name] = decode(cls, common[name], f"optimizer.{name}")
    if isinstance(common.get("schedule"), Mapping):
        common["schedule"] = schedule_from(common["schedule"])
    return decode(Settings, common, "optimizer")
