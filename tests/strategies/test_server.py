"""The server's step: parameters move by the rate, buffers follow the clients' mean whatever the rate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fedsim.aggregate import CenteredClipping
from fedsim.optim import build
from fedsim.strategies.async_fedavg import AsyncFedAvg
from fedsim.strategies.fedavg import FedAvg
from fedsim.strategies.fedavg_m import FedAvgM
from fedsim.strategies.fedavg_m_vr import FedAvgMVR
from fedsim.strategies.fedfix import FedFix
from fedsim.strategies.scaffold import Scaffold
from fedsim.strategies.scaffold_m import ScaffoldM
from fedsim.strategies.scaffold_m_vr import ScaffoldMVR
from fedsim.strategies.server import step_along
from fedsim.tasks.models import resnet_bn
from tests.build import Clocks, Play, digits_task, local_sgd, play, quadratic

X, D = torch.tensor([1.0, 1.0, 5.0]), torch.tensor([1.0, -1.0, 2.0])


def test_parameters_move_by_the_rate_and_buffers_by_at_most_a_mean() -> None:
    assert step_along(X, D, 3.0, 2).tolist() == [-2.0, 4.0, 3.0]
    assert step_along(X, D, 3.0, 2, weight=0.5).tolist() == [-2.0, 4.0, 3.0]
    assert step_along(X, D, 3.0, 2, weight=2.0).tolist() == [-2.0, 4.0, 4.0]
    assert step_along(X, D, 0.5, 3).tolist() == [0.5, 1.5, 4.0]
    assert X.tolist() == [1, 1, 5]


@pytest.mark.parametrize(
    "make",
    [
        lambda local, layout: FedAvg(server_lr=3.0, local=local),
        lambda local, layout: FedAvg(server_optimizer=build({"name": "adam", "lr": 0.01}, layout), local=local),
        lambda local, layout: Scaffold(server_lr=3.0, local=local),
        lambda local, layout: FedAvgM(beta=0.5, gamma=1.0, local=local),
        lambda local, layout: FedAvgMVR(beta=0.5, gamma=1.0, local=local),
        lambda local, layout: ScaffoldM(beta=0.5, gamma=1.0, local=local),
        lambda local, layout: ScaffoldM(
            beta=0.5, server_optimizer=build({"name": "adam", "lr": 0.01}, layout), local=local
        ),
        lambda local, layout: ScaffoldMVR(beta=0.5, gamma=1.0, local=local),
        lambda local, layout: FedFix(interval=1.0, server_lr=3.0, weights="identical", local=local),
    ],
    ids=["fedavg", "fedavg adam", "scaffold", "m", "m vr", "scaffold m", "scaffold m adam", "scaffold m vr", "fedfix"],
)
def test_batch_norm_counts_the_batches_of_a_client_whatever_the_servers_rate(make: Callable[..., Any]) -> None:
    task = digits_task(resnet_bn, [8, 8])
    local = local_sgd(task, 0.01, steps=2, batch_size=4)
    play = Play.start(task, make(local, task.layout), devices=Clocks((1.0, 1.0)))
    x = play.path(3)[-1]
    views = task.layout.views(x)
    counts = {float(v) for k, v in views.items() if "num_batches_tracked" in k}
    assert counts == {6.0}
    assert all(bool((v > 0).all()) for k, v in views.items() if "running_var" in k)


def test_a_contribution_that_weighs_more_than_one_moves_buffers_by_its_mean() -> None:
    task = digits_task(resnet_bn, [8, 8])
    local = local_sgd(task, 0.01, steps=2, batch_size=4)
    strategy = AsyncFedAvg(job_seconds=(3.0, 1.0), local=local)  # d = 2 and 2/3
    play = Play.start(task, strategy, devices=Clocks((1.0, 5.0)))
    views = task.layout.views(play.path(1)[-1])
    assert play.state.d.tolist() == pytest.approx([2.0, 2 / 3])
    assert {float(v) for k, v in views.items() if "num_batches_tracked" in k} == {2.0}


def test_centred_clipping_begins_where_it_ended_in_the_round_before() -> None:
    # one step of rate 1 on a = 1 takes client i to b_i, so that v_i = x - b_i; v <- v + mean of the cut v_i - v
    task = quadratic([1.0] * 3, [0.0, 0.0, 30.0], 10.0)
    strategy = FedAvg(server_lr=0.5, aggregator=CenteredClipping(tau=4.0), local=local_sgd(task, 1.0, steps=1))
    x, v, expected = 10.0, 0.0, []
    for _ in range(6):
        v += sum(max(-4.0, min(4.0, x - b - v)) for b in (0.0, 0.0, 30.0)) / 3
        x -= 0.5 * v
        expected.append(x)
    assert play(task, strategy, 6)[:, 0].tolist() == pytest.approx(expected, rel=1e-12)
