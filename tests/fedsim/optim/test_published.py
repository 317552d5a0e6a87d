"""Rules against plain NumPy written from the paper or after the authors' own loop, where forms differ in details."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fedsim.optim import build
from fedsim.params import Layout

LAYOUT = Layout.of({"w": (3, 4)})


def path(steps: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    return generator.standard_normal(12), generator.standard_normal((steps, 12)) * np.exp(
        generator.normal(size=(steps, 1))
    )


def ours(spec: dict[str, object], x: np.ndarray, grads: np.ndarray) -> np.ndarray:
    optimizer, y = build(spec, LAYOUT), torch.from_numpy(x.copy())[None]
    state = optimizer.init(y)
    for g in grads:
        optimizer.step_(y, torch.from_numpy(g)[None], state)
    return np.asarray(y[0])


@pytest.mark.parametrize("name", ["adam", "yogi"])
def test_fedadam_and_fedyogi_are_those_of_the_paper(name: str) -> None:
    """Reddi et al., algorithm 2: no bias correction, tau outside the root, v begins at tau^2."""
    x0, deltas = path(30)
    tau, lr, beta1, beta2 = 1e-3, 0.01, 0.9, 0.99
    x, v = x0.copy(), np.full(12, tau**2)
    m = np.zeros(12) if name == "adam" else -v  # Yogi's own file starts both moments alike
    for delta in -deltas:  # the paper's delta is local minus received
        m = beta1 * m + (1 - beta1) * delta
        square = delta**2
        v = beta2 * v + (1 - beta2) * square if name == "adam" else v - (1 - beta2) * square * np.sign(v - square)
        x = x + lr * m / (np.sqrt(v) + tau)
    spec = {
        "name": name,
        "lr": lr,
        "beta1": beta1,
        "beta2": beta2,
        "eps": tau,
        "init": tau**2,
        "bias_correction": False,
    }
    assert np.abs(ours(spec, x0, deltas) - x).max() < 1e-13
    assert np.abs(ours({**spec, "bias_correction": True}, x0, deltas) - x).max() > 1e-3


def stable_spam(x: np.ndarray, grads: np.ndarray, interval: int, total: int | None) -> np.ndarray:
    """The authors' loop for one tensor: one counter for all corrections, set back in the middle of a step."""
    lr, beta1, beta2, eps, gamma1, gamma2, gamma3, floor = 0.1, 0.9, 0.999, 1e-8, 0.7, 0.9, 0.999, 0.5
    x, kept_m, kept_v = x.copy(), np.zeros_like(x), np.zeros_like(x)
    top = mean = square = 0.0
    step = 0
    for count, g in enumerate(grads, start=1):
        scale = 1.0 if total is None else floor + (1 - floor) * (1 + math.cos(math.pi * count / (total + 1))) / 2
        m, v = kept_m, kept_v
        step += 1
        largest = np.abs(g).max()
        top = gamma3 * top + (1 - gamma3) * largest
        limit = top / (1 - gamma3**step)
        g = np.where(np.abs(g) > limit, g / largest * limit, g)
        norm = float(np.linalg.norm(g))
        mean = gamma1 * scale * mean + (1 - gamma1 * scale) * norm
        square = gamma2 * square + (1 - gamma2) * norm**2
        wanted = mean / (1 - (gamma1 * scale) ** step) / (math.sqrt(square / (1 - gamma2**step)) + eps)
        g = g / norm * wanted
        if count % interval == 0:
            kept_m, kept_v, step = np.zeros_like(x), np.zeros_like(x), 1
        b1 = beta1 * scale
        m *= b1
        m += (1 - b1) * g
        v *= beta2
        v += (1 - beta2) * g * g
        x -= lr / (1 - b1**step) * m / (np.sqrt(v) / math.sqrt(1 - beta2**step) + eps)
    return x


@pytest.mark.parametrize("interval, total, steps", [(4, None, 11), (1000, 9, 9), (3, 12, 12)])
def test_stable_spam_with_the_official_reset_is_the_authors_loop(interval: int, total: int | None, steps: int) -> None:
    x, grads = path(steps)
    spec = {"name": "stable_spam", "lr": 0.1, "interval": interval, "total": total or 0, "official_reset": True}
    assert np.abs(ours(spec, x, grads) - stable_spam(x, grads, interval, total)).max() < 1e-12


def test_adabelief_keeps_the_eps_of_the_authors_code() -> None:
    x0, grads = path(8)
    x, m, s = x0.copy(), np.zeros(12), np.zeros(12)
    for t, g in enumerate(grads, start=1):
        m = 0.9 * m + 0.1 * g
        s = 0.999 * s + 0.001 * (g - m) ** 2 + 1e-16
        x = x - 0.1 / (1 - 0.9**t) * m / (np.sqrt(s / (1 - 0.999**t)) + 1e-16)
    assert np.abs(ours({"name": "adabelief", "lr": 0.1}, x0, grads) - x).max() < 1e-12


def test_sgdp_projects_the_step_and_not_its_momentum() -> None:
    """Heo et al., algorithm 1 with a projection at every step (delta is large); the authors' file alters m as well."""
    x0, grads = path(5)
    x, m = x0.copy(), np.zeros(12)
    for g in grads:
        m = 0.9 * m + g
        rows, steps = x.reshape(3, 4), m.reshape(3, 4)
        unit = rows / (np.linalg.norm(rows, axis=1, keepdims=True) + 1e-8)
        x = x - 0.01 * (steps - unit * (unit * steps).sum(1, keepdims=True)).reshape(-1)
    spec = {"name": "sgdp", "lr": 0.01, "momentum": 0.9, "delta": 1e3}
    assert np.abs(ours(spec, x0, grads) - x).max() < 1e-13
