"""Strategies of local steps in tables: plain twins, first steps and limits by hand, and what settings may be."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from fedsim.strategies.fedavg import FedAvg
from fedsim.strategies.fedavg_m import FedAvgM
from fedsim.strategies.fedavg_m_vr import FedAvgMVR
from fedsim.strategies.fedcm import FedCM
from fedsim.strategies.feddyn import FedDyn
from fedsim.strategies.fednova import FedNova
from fedsim.strategies.fedprox import FedProx
from fedsim.strategies.mb_storm import MBStorm
from fedsim.strategies.scaffold import Scaffold
from fedsim.strategies.scaffold_m import ScaffoldM
from fedsim.strategies.scaffold_m_vr import ScaffoldMVR
from fedsim.tasks.models import mlp
from tests.build import Play, local_sgd, play, two_clients
from tests.reference.drift import feddyn, fedprox
from tests.reference.fedavg import fedavg
from tests.reference.momentum import fedavg_m
from tests.reference.scaffold import scaffold
from tests.reference.scaffold_m import scaffold_m
from tests.strategies.tasks import images, noisy

TWINS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "fedavg": (FedAvg, fedavg, {"server_lr": 0.7}),
    "fedavg_m": (FedAvgM, fedavg_m, {"beta": 0.3}),
    "fedavg_m_vr": (FedAvgMVR, partial(fedavg_m, reduced=True), {"beta": 0.3}),
    "scaffold, option I": (Scaffold, scaffold, {"option": "I", "server_lr": 0.8}),
    "scaffold, option II": (Scaffold, scaffold, {"option": "II", "server_lr": 0.8}),
    "scaffold_m": (ScaffoldM, scaffold_m, {"beta": 0.3}),
    "scaffold_m_vr": (ScaffoldMVR, partial(scaffold_m, reduced=True), {"beta": 0.3}),
    "fedprox": (FedProx, fedprox, {"mu": 0.7}),
    "feddyn": (FedDyn, feddyn, {"alpha": 0.4}),
}
"""(strategy, twin, settings of both). Twins of other strategies are compared in tests/strategies."""

every_twin = pytest.mark.parametrize("name", TWINS)


def _compare(name: str, task: Any, twin: Any, rounds: int, size: int | None, eta: float, **local: Any) -> Any:
    """(models after every round, those of the twin)."""
    kind, plain, settings = TWINS[name]
    strategy = kind(cohort_size=size, local=local_sgd(task, eta, **local), **settings)
    length = {"gamma": eta * local["steps"]} if "beta" in settings else {}  # where left out, as far as FedAvg would
    expected = plain(twin, task.x0, rounds, eta=eta, size=size, **settings, **length)
    return play(task, strategy, rounds, width=2), expected


@every_twin
@pytest.mark.parametrize("size", [None, 2])
def test_it_equals_its_twin_on_noisy_quadratics(name: str, size: int | None) -> None:
    task, twin = noisy(steps=3)
    if name == "scaffold, option I":  # a full gradient has no noise
        task.noise = twin.noise = 0.0
    found, expected = _compare(name, task, twin, 8, size, 0.05, steps=3)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@every_twin
@pytest.mark.parametrize("hidden", [8, 200])  # step by step, and in factors where a rule can
def test_it_equals_a_plain_loop_of_autograd(name: str, hidden: int) -> None:
    task, twin = images(lambda shape, k: mlp(shape, k, hidden=(hidden,)), [7, 20, 1, 13], 5, steps=4)
    found, expected = _compare(name, task, twin, 4, 3, 0.1, steps=4, batch_size=5)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize(
    "kind, settings, first",
    [
        (FedAvg, {}, [0.862802, 0.648483, 0.608091]),
        (FedAvgM, {"beta": 0.1, "gamma": 1.0}, [1.77309, 1.39982, 0.972778]),
        (FedCM, {"alpha": 0.1}, [1.77309, 1.39982, 0.972778]),
        (FedAvgMVR, {"beta": 0.1, "gamma": 0.1}, [1.98863, 1.97319, 1.95639]),
        (Scaffold, {}, [0.862802, 0.675566, 0.683982]),
        (ScaffoldM, {"beta": 0.1, "gamma": 1.0}, [1.77309, 1.39838, 0.969939]),
        (ScaffoldMVR, {"beta": 0.1, "gamma": 0.1}, [1.98863, 1.97248, 1.95471]),
    ],
)
def test_two_clients_walk_as_worked_out(kind: Any, settings: dict[str, Any], first: list[float]) -> None:
    x = play(two_clients(), kind(local=local_sgd(two_clients()), **settings), 3)[:, 0]
    assert x.tolist() == pytest.approx(first, rel=5e-6)  # six digits


@pytest.mark.parametrize(
    "kind, settings, rounds, limit",
    [
        (FedAvg, {}, 60, 0.598711),
        (FedAvgM, {"beta": 0.1, "gamma": 1.0}, 250, 0.733055),
        (FedAvgMVR, {"beta": 0.1, "gamma": 0.5}, 450, 0.598711),  # that of FedAvg: beta does not shrink the bias
        (Scaffold, {}, 120, 0.75),
        (MBStorm, {"beta": 0.3, "gamma": 0.2}, 300, 0.75),
    ],
)
def test_two_clients_end_where_they_must(kind: Any, settings: dict[str, Any], rounds: int, limit: float) -> None:
    x = play(two_clients(), kind(local=local_sgd(two_clients()), **settings), rounds)[-1]
    assert float(x) == pytest.approx(limit, abs=1e-6)


@pytest.mark.parametrize("kind, kept, mean", [(Scaffold, "c", "c"), (FedDyn, "g", "h")])
def test_a_client_without_data_keeps_zero(kind: Any, kept: str, mean: str) -> None:
    task, _ = images(mlp, [6, 0, 9], 4)
    game = Play.start(task, kind(local=local_sgd(task, 0.1, epochs=1, steps=None, batch_size=4)))
    game.path(2)
    rows = game.fleet.memory.of(torch.arange(3))[kept]
    assert rows[1].abs().max() == 0 and rows[0].abs().max() > 0
    torch.testing.assert_close(getattr(game.state, mean), rows.mean(0), rtol=0, atol=1e-7)


NAN, INF = float("nan"), float("inf")
REFUSED: list[tuple[Any, str, list[float]]] = [
    (FedAvg, "server_lr", [0.0, -1.0, INF]),
    (FedAvgM, "beta", [0.0, 1.5]),
    (FedAvgM, "gamma", [-1.0, INF]),
    (FedCM, "alpha", [0.0, 1.5, NAN]),
    (FedProx, "mu", [-0.1, INF, NAN]),
    (FedDyn, "alpha", [0.0, -1.0, NAN]),
    (FedNova, "mu", [-0.1, NAN]),
    *((kind, "cohort_size", [0]) for kind in (FedAvg, FedAvgM, FedCM, FedProx, FedDyn, FedNova)),
]


@pytest.mark.parametrize("kind, key, values", REFUSED)
def test_settings_out_of_range_are_refused(kind: Any, key: str, values: list[float]) -> None:
    for value in values:
        with pytest.raises(ValueError, match=key):
            kind(local=local_sgd(two_clients()), **{key: value})
