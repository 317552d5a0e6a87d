"""Saddle points: optimistic gradient, sets and penalties, local steps, and the steps that theories allow."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fedsim.compose import compose
from fedsim.compress.sparsify import Identity, RandK, TopK
from fedsim.config import ConfigError
from fedsim.prox import L1, Ball, Box, Simplex
from fedsim.strategies.diana import Diana
from fedsim.strategies.ef21 import EF21
from fedsim.strategies.extragradient import Extragradient
from fedsim.strategies.fedavg import FedAvg
from fedsim.strategies.marina import Marina
from fedsim.strategies.masha1 import Masha1
from fedsim.strategies.optimistic_gradient import OptimisticGradient
from fedsim.tasks.bilinear import BilinearTask
from tests.build import Play, drawn, local_sgd, play, saddle, two_clients
from tests.reference.clients import Operators

KINDS: list[tuple[type, dict[str, Any]]] = [
    (Extragradient, {}),
    (OptimisticGradient, {}),
    (Masha1, {"p": 0.5, "compressor": RandK(fraction=0.5)}),
]
every = pytest.mark.parametrize("kind, fields", KINDS, ids=[kind.__name__ for kind, _ in KINDS])


def _last(task: BilinearTask, strategy: Any, rounds: int) -> Tensor:
    return play(task, strategy, rounds)[-1]


def _given(matrix: Any, a: Any, b: Any, **settings: Any) -> BilinearTask:
    """One client's saddle point."""
    tensors = [torch.tensor([v], dtype=torch.float64) for v in (matrix, a, b)]
    return BilinearTask(tensors[0], tensors[1], tensors[2], **settings)


# Optimistic gradient ---------------------------------------------------------------------------------------------


def test_it_converges_on_a_bilinear_problem_with_half_of_extragradients_messages() -> None:
    task = saddle(4, 6, low=1.0)
    play = Play.start(task, OptimisticGradient(lr=0.25))
    path = play.path(120)
    away = (path - task.solution()).norm(dim=1)
    assert float(away[-1]) < 1e-3 * float(away[0])
    assert play.fleet.ledger.bits_up == 120 * 4 * 32 * 12


# Sets and penalties ----------------------------------------------------------------------------------------------


@every
def test_the_game_of_stone_scissors_paper_is_played_evenly(kind: type, fields: dict[str, Any]) -> None:
    pay, bias = [[0.0, 1.0, -1.0], [-1.0, 0.0, 1.0], [1.0, -1.0, 0.0]], [0.0] * 3
    task = _given(pay, bias, bias, prox=Simplex())
    even = torch.full((6,), 1 / 3, dtype=torch.float64)
    torch.testing.assert_close(task.solution(), even, rtol=0, atol=1e-9)
    task.b[0, 0] = 0.1  # the players begin uneven, and go on as if the game were even
    start = play(task, Extragradient(lr=0.3, prox=task.prox), 1)[-1]
    task.b[0, 0] = 0.0
    found = play(task, kind(lr=0.2, prox=task.prox, **fields), 250, x0=start)[-1]
    torch.testing.assert_close(found, even, rtol=0, atol=1e-3)


@every
def test_corners_and_zeros_are_where_they_must_be(kind: type, fields: dict[str, Any]) -> None:
    # x y - 3 x in the box: x goes up to 1, and y with it; and the closed form of a penalty where x and y do not meet
    box = _given([[1.0]], [-3.0], [0.0], prox=Box())
    assert _last(box, kind(lr=0.2, prox=box.prox, **fields), 60).tolist() == pytest.approx([1.0, 1.0])
    apart = _given([[0.0, 0.0], [0.0, 0.0]], [3.0, 0.5], [-2.0, 0.9], lam=2.0, prox=L1(weight=1.0))
    expected = [-(3 - 1) / 2, 0.0, -(2 - 1) / 2, 0.0]
    assert _last(apart, kind(lr=0.1, prox=apart.prox, **fields), 120).tolist() == pytest.approx(expected, abs=1e-6)
    assert apart.solution().tolist() == pytest.approx(expected, abs=1e-9)


@every
def test_inside_a_ball_the_last_point_is_the_projection_of_its_own_step(kind: type, fields: dict[str, Any]) -> None:
    task = saddle(3, 4, lam=0.5, prox=Ball(radius=0.2))
    z = _last(task, kind(lr=0.1, prox=task.prox, **fields), 200)
    twin = Operators(task.matrix, task.a, task.b, 0.5)
    ahead = z - torch.stack([twin.full(m, z) for m in range(3)]).mean(0)
    for half, moved in zip(z.chunk(2), ahead.chunk(2), strict=True):
        torch.testing.assert_close(half, moved * (0.2 / moved.norm()).clamp(max=1), rtol=0, atol=1e-6)
    assert task.evaluate(z, None)["distance"] < 1e-6  # type: ignore[arg-type]


def test_clients_of_masha1_project_as_the_server_does() -> None:
    task = saddle(3, 4, prox=Ball(radius=0.2))
    play = Play.start(task, Masha1(lr=0.2, p=0.5, compressor=RandK(k=2), prox=task.prox))
    play.path(6)
    assert torch.equal(play.fleet.memory.of(play.fleet.clients)["z"], play.state.x.expand(3, -1))


SADDLE: dict[str, Any] = {
    "rounds": 2,
    "task": {"name": "bilinear", "dim": 3, "prox": {"name": "ball", "radius": 0.5}},
    "clients": {"count": 3},
    "strategy": {"name": "extragradient", "lr": 0.1},
}


def test_a_file_gives_the_tasks_set_to_the_strategy() -> None:
    made = compose(SADDLE, "x.yaml")
    assert made.experiment.strategy.prox == made.experiment.task.prox  # type: ignore[attr-defined]
    assert made.resolved["task"]["prox"] == {"name": "ball", "radius": 0.5}
    compose(made.resolved, "again").close()
    made.close()


@pytest.mark.parametrize("strategy", [{"name": "masha2", "lr": 0.1}, {"name": "ef21"}])
def test_a_set_that_a_strategy_would_leave_is_refused(strategy: dict[str, Any]) -> None:
    task = {**SADDLE["task"], "lam": 1.0}
    with pytest.raises(ConfigError, match=f"task.prox: {strategy['name']} has no prox .*extragradient"):
        compose({**SADDLE, "task": task, "strategy": strategy}, "x.yaml")


# Local steps -----------------------------------------------------------------------------------------------------


def test_fedavg_on_a_saddle_point_is_local_descent_ascent() -> None:
    task = saddle(3, 4, lam=0.8)
    twin, z = Operators(task.matrix, task.a, task.b, 0.8), task.init(0)
    for _ in range(5):
        ends = []
        for m in range(3):
            y = z
            for _ in range(4):
                y = y - 0.05 * twin.full(m, y)
            ends.append(y)
        z = torch.stack(ends).mean(0)
    got = _last(task, FedAvg(local=local_sgd(task, 0.05, steps=4)), 5)
    torch.testing.assert_close(got, z, rtol=0, atol=1e-12)


# Steps that theories allow ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, fields, bound",
    [
        (EF21, {"compressor": Identity()}, 1 / 2),  # the mean of curvatures 1 and 3
        (Diana, {"compressor": Identity()}, 1 / 3),
        (Marina, {"compressor": Identity(), "p": 1.0}, 5**-0.5),  # sqrt((1 + 9) / 2)
        (Extragradient, {"lr": 0.1}, 1 / 2),
        (OptimisticGradient, {"lr": 0.1}, 1 / 4),
    ],
)
def test_bounds_of_two_clients_as_worked_out(kind: type, fields: dict[str, Any], bound: float) -> None:
    task = two_clients()
    local = {} if "lr" in fields else {"local": local_sgd(task, 0.1)}
    assert kind(**fields, **local).proven(task.constants, 1) == pytest.approx((0.1, bound))


def test_bounds_with_a_compressor_as_worked_out() -> None:
    task = drawn(4, 10)
    worst, mean = float(task.a.max()), float(task.a.mean(0).max())
    rms = float(task.a.max(1).values.square().mean().sqrt())
    local = local_sgd(task, 0.1)
    assert Diana(compressor=RandK(k=2), local=local).proven(task.constants, 10)[1] == pytest.approx(1 / (worst * 5))  # type: ignore[index]
    marina = Marina(compressor=RandK(k=2), p=0.5, local=local).proven(task.constants, 10)
    assert marina is not None and marina[1] == pytest.approx(1 / (2 * rms))  # sqrt(0.5 * 4 / (0.5 * 4)) = 1
    ef21 = EF21(compressor=TopK(k=2), local=local).proven(task.constants, 10)  # delta = 5
    left = 0.8**0.5
    assert ef21 is not None and ef21[1] == pytest.approx(1 / (mean + rms * left / (1 - left)))
    assert EF21(compressor=RandK(k=2), local=local).proven(task.constants, 10) == ef21  # scaled, it has that delta, too
    assert EF21(compressor=TopK(k=2), cohort_size=2, local=local).proven(task.constants, 10) is None


@pytest.mark.parametrize("kind", [EF21, Diana, Marina])
def test_bounds_of_descent_are_silent_about_saddle_points(kind: type) -> None:
    task = saddle(3, 4, lam=1.0)
    assert kind(local=local_sgd(task, 0.1)).proven(task.constants, 8) is None


def test_bounds_of_masha1_on_one_client_as_worked_out() -> None:
    # L = 5 of [[3, 4], [-4, 3]]; Q_s of Rand-1 of 2 has q_s = 2, Q has q = 1; p / (2 mu) is the other bound
    task = _given([[4.0]], [0.0], [0.0], lam=3.0)
    fields: dict[str, Any] = {"lr": 0.1, "server_compressor": RandK(k=1)}
    assert Masha1(p=1.0, **fields).proven(task.constants, 2) == pytest.approx((0.1, 1 / (2 * 50**0.5)))
    assert Masha1(p=0.01, **fields).proven(task.constants, 2) == pytest.approx((0.1, 0.01 / 6))
    assert Masha1(p=1.0, cohort_size=1, **fields).proven(task.constants, 2) is None


def test_a_step_above_the_bound_is_said_with_the_bound() -> None:
    with pytest.warns(UserWarning, match=r"the step 9 is above 0\.\d+, up to which the theory"):
        compose({**SADDLE, "strategy": {"name": "extragradient", "lr": 9.0}}, "x.yaml").close()
