"""Small pieces that several rules share: host arithmetic, coefficients of Adam's kind, starting a state at x."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from fedsim.optim.rule import Named


def where(condition: Any, yes: Any, no: Any) -> Any:
    """numpy.where that keeps plain numbers plain."""
    if isinstance(condition, bool):
        return yes if condition else no
    return np.where(condition, yes, no)


def maximum(a: Any, b: Any) -> Any:
    """numpy.maximum that keeps plain numbers plain, which is ten times as fast."""
    return max(a, b) if _plain(a, b) else np.maximum(a, b)


def minimum(a: Any, b: Any) -> Any:
    """numpy.minimum that keeps plain numbers plain."""
    return min(a, b) if _plain(a, b) else np.minimum(a, b)


def ratio(a: Any, b: Any) -> Any:
    """a / b, and 0 where b is not above 0."""
    if _plain(a, b):
        return a / b if b > 0 else 0.0
    positive = np.greater(b, 0)
    return np.where(positive, a / np.where(positive, b, 1.0), 0.0)[()]


def _plain(*values: Any) -> bool:
    return all(type(v) in (float, int) for v in values)


def scaled(g: Tensor, factor: Tensor | float) -> Tensor:
    """g * factor, without a copy when the factor is the number one."""
    return g if isinstance(factor, float | int) and factor == 1 else g * factor


def nonzero(size: Tensor) -> Tensor:
    """Numbers to divide by: zeros become one."""
    return size.masked_fill(size == 0, 1.0)


def start_(state: Tensor, x: Tensor, first: Tensor | float) -> None:
    """Set a state to x for the clients whose first step this is (first = 1, else 0)."""
    if not isinstance(first, float) or first != 0:
        state.lerp_(x, first)


def adam_coefficients(
    beta1: Any, beta2: Any, eps: Any, t: Any, *, raw: bool = False, corrected: bool = True
) -> dict[str, Any]:
    """What Adam-like rules need; `root` and `shift` make `denominator` contain the bias corrections of m and v."""
    bc1, bc2 = (1 - beta1**t, 1 - beta2**t) if corrected else (1.0, 1.0)
    root = bc1 / np.sqrt(bc2)
    shift = root * eps if raw else bc1 * eps
    own = {"a1": 1 - beta1, "a2": 1 - beta2, "root": root, "shift": shift}
    return own | {"t": t, "beta1": beta1, "beta2": beta2, "eps": eps}


def denominator(v: Tensor, c: Named) -> Tensor:
    """bc1 * (sqrt(v / bc2) + eps), so that m divided by it is Adam's direction."""
    return v.sqrt().mul_(c.root).add_(c.shift)


def rectification(beta1: Any, beta2: Any, eps: Any, t: Any, threshold: Any) -> dict[str, Any]:
    """RAdam's factor: u = m * scale / (sqrt(v) * on + off), which is m / bc1 while the variance is not tractable.

    Liu et al. On the variance of the adaptive learning rate and beyond. arXiv:1908.03265. `threshold` says from which
    length of the approximated average on the second moment is used.
    """
    bc1, bc2 = 1 - beta1**t, 1 - beta2**t
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * t * beta2**t / bc2
    use = threshold(length)
    safe = np.maximum(length, 4 + 1e-9)
    r = np.sqrt((safe - 4) * (safe - 2) * longest / ((longest - 4) * (longest - 2) * safe))
    return {
        "scale": np.where(use, r * np.sqrt(bc2) / bc1, 1 / bc1)[()],
        "on": np.where(use, 1.0, 0.0)[()],
        "off": np.where(use, eps, 1.0)[()],
    }
