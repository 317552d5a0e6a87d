"""Torch's fused kernels for the rules that have one: one pass over the arrays.

They are private functions of torch, so each is tried once on a tiny array per device type and type of number; where
that fails, or gives another answer than the formula, the eager formula is used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedsim.optim.adaptive import Adam
from fedsim.optim.elementwise import Sgd
from fedsim.optim.rule import Rule

if TYPE_CHECKING:
    from fedsim.optim.pipeline import Part

# Entries of a block from which decay inside the kernel pays, with the coordinates that do not decay stepped apart;
# in smaller ones one more product is cheaper. The numbers are the same.
_APART = 1 << 17

# Kernel(rule, arrays, coefficients, weight decay, whether that is decoupled)
Lists = Mapping[str, list[Tensor]]  # x, g and the states, each a list of contiguous arrays
Kernel = Callable[[Rule, Lists, Mapping[str, float], float, bool], None]


def fused_step_(part: Part, arrays: Mapping[str, Tensor], coefs: Mapping[str, Any]) -> None:
    """One step of some rows by torch's kernel.

    Args:
        part: the rule and its decay.
        arrays: x, g and the states, each [k, P]; all but g are changed.
        coefs: of the step, numbers that all clients share, `lr` among them.
    """
    x, decay = arrays["x"], part.base.weight_decay if part.mode is not None else 0.0
    assert isinstance(decay, float | int)
    kernel = kernel_for(part.rule, x.device.type, x.dtype)
    assert kernel is not None
    decoupled = part.mode == "decoupled"
    if not decoupled or part.decay_weights is None:
        kernel(part.rule, _lists(arrays), coefs, decay, decoupled)
        return
    undecayed = part.undecayed(x)
    if undecayed is None or x.numel() < _APART:
        x.mul_(part.decay_factor(x, coefs["lr"] * decay))
        kernel(part.rule, _lists(arrays), coefs, 0.0, True)
        return
    apart = {n: a.index_select(1, undecayed) for n, a in arrays.items()}
    kernel(part.rule, _lists(arrays), coefs, decay, True)
    kernel(part.rule, _lists(apart), coefs, 0.0, True)
    x.index_copy_(1, undecayed, apart["x"])


def _lists(arrays: Mapping[str, Tensor]) -> Lists:
    """Each array as it is if all are contiguous, else all row by row."""
    whole = all(a.is_contiguous() for a in arrays.values())
    return {n: [a] if whole else list(a.unbind(0)) for n, a in arrays.items()}


def kernel_for(rule: Rule, device: str, dtype: torch.dtype) -> Kernel | None:
    """The fused step of a rule on a kind of device, or None."""
    if not has_kernel(rule):
        return None
    kernel, name = (_sgd, "sgd") if type(rule) is Sgd else (_adam, "adam")
    return kernel if _works(kernel, name, device, dtype) else None


def has_kernel(rule: Rule) -> bool:
    """Whether torch has a kernel for this form of the rule."""
    if type(rule) is Sgd:
        return not rule.ema
    return type(rule) is Adam and rule.eps_mode == "corrected"


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
def _works(kernel: Kernel, name: str, device: str, dtype: torch.dtype) -> bool:
    """Whether this torch has the kernel, with the arguments and the meaning expected here."""
    rule: Rule = Sgd(momentum=0.5) if name == "sgd" else Adam()
    c = {"lr": 0.5, "keep": 0.5, "take": 1.0, "t": 1.0, "beta1": 0.9, "beta2": 0.999, "eps": 0.0}
    arrays = {n: [torch.full((3,), v, device=device, dtype=dtype)] for n, v in (("x", 1.0), ("g", 2.0))}
    arrays |= {n: [torch.zeros(3, device=device, dtype=dtype)] for n in (("m",) if name == "sgd" else ("m", "v"))}
    try:
        kernel(rule, arrays, c, 0.0, False)
    except (AttributeError, TypeError, RuntimeError):
        return False
    expected = 0.0 if name == "sgd" else 0.5  # 1 - 0.5 * 2 and 1 - 0.5 * sign
    return bool(torch.allclose(arrays["x"][0], torch.full_like(arrays["x"][0], expected)))
