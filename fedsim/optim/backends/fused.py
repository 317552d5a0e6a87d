"""Torch's fused kernels for the rules that have one: one pass over the arrays, without a compiler.

They are private functions of torch, so each is tried once on a tiny array per device type and type of number; where
that fails, or gives another answer than the formula, the back end suits no step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fedsim.optim.backends.rows import by_rows
from fedsim.optim.groups import Recipe
from fedsim.optim.rule import Rule
from fedsim.optim.rules.adaptive import Adam
from fedsim.optim.rules.momentum import Sgd
from fedsim.optim.step import Block, shrink_

# Kernel(rule, arrays, coefficients, weight decay, whether that is decoupled)
Lists = Mapping[str, list[Tensor]]  # x, g and the states, each a list of contiguous arrays
Kernel = Callable[[Any, Lists, Mapping[str, float], float, bool], None]


class Fused:
    """Torch's own kernel, where it does exactly what is asked."""

    name, automatic = "fused", True

    def has_kernel(self, recipe: Recipe) -> bool:
        """Whether torch has a kernel for this rule with these settings (per-client numbers aside)."""
        group, clip = recipe.groups[0], recipe.settings.clip
        if not recipe.alone or group.lr_factors is not None or clip.value is not None:
            return False
        if not (group.mode in (None, "decoupled") or (group.mode == "l2" and group.decay_factors is None)):
            return False
        return _kernel_of(group.rule) is not None

    def suits(self, recipe: Recipe, x: Tensor, block: Block) -> bool:
        """Where there is a kernel, all clients agree on every number, and nothing is added to the rule."""
        if block.shared or not self.has_kernel(recipe) or any(isinstance(v, Tensor) for v in block.coefs[0].values()):
            return False
        kernel = _kernel_of(recipe.groups[0].rule)
        assert kernel is not None
        return _works(kernel, x.device.type, x.dtype)

    def step(self, recipe: Recipe, x: Tensor, g: Tensor, block: Block) -> list[int]:
        """One step of all rows; returns those left out."""
        # the gradient should be near still after the look at what is not finite
        return by_rows(recipe, x, g, block, 1 << 20, lambda x, g, b: _step_(recipe, x, g, b))


def _step_(recipe: Recipe, x: Tensor, g: Tensor, block: Block) -> None:
    group, states, coefs = recipe.groups[0], block.states[0], block.coefs[0]
    kernel, decoupled = _kernel_of(group.rule), group.mode == "decoupled"
    assert kernel is not None
    decay = group.base.weight_decay if group.mode is not None else 0.0
    if decoupled and group.decay_factors is not None:  # the kernel knows one rate for all coordinates
        shrink_(x, coefs["decay_rate"], states["decay_weights"])
        decay = 0.0
    assert isinstance(decay, float | int)
    kernel(
        group.rule, _lists({"x": x, "g": g} | {s.name: states[s.name] for s in group.states}), coefs, decay, decoupled
    )


def _kernel_of(rule: Rule) -> Kernel | None:
    """Torch's kernel for this form of the rule, or None."""
    if type(rule) is Sgd and not rule.ema:
        return _sgd
    if type(rule) is Adam and rule.eps_mode == "corrected" and rule.bias_correction:
        return _adam
    return None


def _lists(arrays: Mapping[str, Tensor]) -> Lists:
    """Each array as it is if all are contiguous, else all row by row."""
    whole = all(a.is_contiguous() for a in arrays.values())
    return {n: [a] if whole else list(a.unbind(0)) for n, a in arrays.items()}


def _sgd(rule: Any, arrays: Lists, c: Mapping[str, float], decay: float, decoupled: bool) -> None:
    if decoupled and decay:
        for x in arrays["x"]:
            x.mul_(1 - c["lr"] * decay)
        decay = 0.0
    if "m" not in arrays and not decay:
        for x, g in zip(arrays["x"], arrays["g"], strict=True):
            x.add_(g, alpha=-c["lr"])
        return
    torch._fused_sgd_(
        arrays["x"],
        arrays["g"],
        arrays.get("m", []),
        weight_decay=decay,
        momentum=c.get("keep", 0.0),
        lr=c["lr"],
        dampening=1 - c.get("take", 1.0),  # 0 at a client's first step, whose momentum is zero
        nesterov=rule.nesterov,
        maximize=False,
        is_first_step=False,
    )


def _adam(rule: Any, arrays: Lists, c: Mapping[str, float], decay: float, decoupled: bool) -> None:
    step = torch.full((), c["t"], dtype=torch.float32, device=arrays["x"][0].device)
    kernel = torch._fused_adamw_ if decoupled else torch._fused_adam_
    kernel(
        arrays["x"],
        arrays["g"],
        arrays["m"],
        arrays["v"],
        arrays.get("v_max", []),
        [step] * len(arrays["x"]),
        lr=c["lr"],
        beta1=c["beta1"],
        beta2=c["beta2"],
        weight_decay=decay,
        eps=c["eps"],
        amsgrad=rule.amsgrad,
        maximize=False,
    )


@cache
def _works(kernel: Kernel, device: str, dtype: torch.dtype) -> bool:
    """Whether this torch has the kernel, with the arguments and the meaning expected here."""
    rule: Rule = Sgd(momentum=0.5) if kernel is _sgd else Adam()
    c = {"lr": 0.5, "keep": 0.5, "take": 1.0, "t": 1.0, "beta1": 0.9, "beta2": 0.999, "eps": 0.0}
    arrays = {n: [torch.full((3,), v, device=device, dtype=dtype)] for n, v in (("x", 1.0), ("g", 2.0))}
    arrays |= {n: [torch.zeros(3, device=device, dtype=dtype)] for n in (("m",) if kernel is _sgd else ("m", "v"))}
    try:
        kernel(rule, arrays, c, 0.0, False)
    except (AttributeError, TypeError, RuntimeError):
        return False
    expected = 0.0 if kernel is _sgd else 0.5  # 1 - 0.5 * 2 and 1 - 0.5 * sign
    return bool(torch.allclose(arrays["x"][0], torch.full_like(arrays["x"][0], expected)))
