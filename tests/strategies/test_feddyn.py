"""FedDyn: the limits of exact local solutions, and h as the mean of what all clients keep."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fedsim.compose import compose
from fedsim.config import ConfigError
from fedsim.strategies.feddyn import FedDyn
from fedsim.tasks.models import resnet_bn
from tests.build import Play, drawn, local_sgd, play, quadratic, two_clients
from tests.strategies.tasks import images, noisy


def kept(play: Play) -> Tensor:
    """[N, P]: what all clients keep."""
    return play.fleet.memory.of(play.fleet.clients)["g"]


@pytest.mark.parametrize("size", [None, 1])
def test_exact_local_solutions_lead_to_the_optimum_where_g_are_the_gradients(size: int | None) -> None:
    task = two_clients()
    strategy = FedDyn(cohort_size=size, alpha=1.0, local=local_sgd(task, 1 / 3, steps=25))
    play = Play.start(task, strategy)
    assert float(play.path(80)[-1]) == pytest.approx(0.75, abs=1e-9)
    assert kept(play)[:, 0].tolist() == pytest.approx([1 * (0.75 - 0), 3 * (0.75 - 1)], abs=1e-9)


@pytest.mark.parametrize("size", [None, 3])
def test_a_few_local_steps_lead_there_too(size: int | None) -> None:
    task = drawn(6, 3)
    best = (task.a * task.b).sum(0) / task.a.sum(0)
    strategy = FedDyn(cohort_size=size, alpha=1.0, local=local_sgd(task, 0.2, steps=4))
    torch.testing.assert_close(play(task, strategy, 100)[-1], best, rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [None, 2])
@pytest.mark.parametrize("optimizer", [None, {"name": "adam", "lr": 0.02}])
def test_h_is_the_mean_of_what_all_clients_keep_at_all_times(
    size: int | None, optimizer: dict[str, Any] | None
) -> None:
    task, _ = noisy(steps=3)
    play = Play.start(task, FedDyn(cohort_size=size, local=local_sgd(task, 0.05, steps=3, optimizer=optimizer)))
    for _ in range(8):
        play.step()
        torch.testing.assert_close(play.state.h, kept(play).mean(0), rtol=0, atol=1e-13)
        assert play.state.h.abs().max() > 0


def test_one_client_that_solves_its_problem_stays_there() -> None:
    # h / alpha undoes half of the pull: y = (a b + alpha x + g) / (a + alpha), and at b all of it vanishes
    task = quadratic([2.0], [1.0], 3.0)
    x = play(task, FedDyn(alpha=2.0, local=local_sgd(task, 0.25, steps=1)), 40)[:, 0]
    assert float(x[0]) == pytest.approx(1.0, abs=1e-12)  # y = 2, h = 2 * (3 - 2) = 2, x = 2 - 2 / 2
    assert float(x[-1]) == pytest.approx(1.0, abs=1e-9)


def test_buffers_of_a_model_follow_the_mean_alone() -> None:
    task, _ = images(resnet_bn, [8, 8], 4)
    strategy = FedDyn(alpha=0.01, local=local_sgd(task, 0.01, epochs=1, steps=None, batch_size=4))
    play = Play.start(task, strategy)
    play.step()
    x, n = play.state.x, task.layout.num_trainable
    replies = play.fleet.ask(torch.arange(2), strategy.local_update, x=x)
    play = Play.start(task, strategy)
    play.path(1)
    assert play.state.h[n:].abs().max() == 0 and replies["delta"][:, n:].abs().max() > 0
    assert torch.equal(play.state.x, x)
    assert x.isfinite().all() and task.layout.num_buffers > 0


@pytest.mark.parametrize(
    "key, value",
    [
        ("strategy", {"name": "feddyn", "aggregator": "median"}),
        ("strategy", {"name": "feddyn", "aggregator": "mean"}),
        ("strategy", {"name": "feddyn", "pre_aggregators": [{"name": "nnm", "f": 1}]}),
        ("uplink", {"compressor": {"name": "rand_k", "fraction": 0.5}}),
        ("downlink", {"compressor": "natural"}),
    ],
)
def test_what_would_part_h_from_what_clients_keep_is_refused(key: str, value: dict[str, Any]) -> None:
    config = {"rounds": 1, "task": "quadratic", "clients": {"count": 4}, "strategy": "feddyn", key: value}
    with pytest.raises(ConfigError, match="h must stay the mean of what all clients keep"):
        compose(config, "x.yaml").close()
