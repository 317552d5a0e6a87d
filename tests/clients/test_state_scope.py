"""How long a local optimizer's state lives: a round, with its client, or with the server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fedsim
from fedsim import runs
from fedsim.compose import compose
from fedsim.config import ConfigError
from fedsim.optim import build
from fedsim.params import Layout
from fedsim.strategies.fedavg import FedAvg
from fedsim.tasks.quadratic import QuadraticTask
from tests.build import Play, drawn, local_sgd, play, quadratic

CONFIG: dict[str, Any] = {
    "rounds": 6,
    "task": {"name": "quadratic", "dim": 4, "noise": 0.1},
    "clients": {"count": 5},
    "strategy": {"name": "fedavg", "cohort_size": 3},
    "local": {"steps": 3, "optimizer": {"name": "adam", "lr": 0.05, "state_scope": "server"}},
    "checkpoint": {"every": 2},
}


def mean_gradient(task: QuadraticTask, x: Tensor) -> Tensor:
    return (task.a * (x - task.b)).mean(0)


@pytest.mark.parametrize("nesterov", [False, True])
def test_one_step_of_all_clients_with_the_servers_momentum_is_central_momentum(nesterov: bool) -> None:
    task, rounds = drawn(clients=4, dim=3), 7
    rule = {"name": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": nesterov}
    strategy = FedAvg(local=local_sgd(task, steps=1, optimizer={**rule, "state_scope": "server"}))
    found = play(task, strategy, rounds)
    x = task.x0.clone().requires_grad_()
    central = torch.optim.SGD([x], lr=0.1, momentum=0.9, nesterov=nesterov)
    for r in range(rounds):
        x.grad = mean_gradient(task, x.detach())
        central.step()
        torch.testing.assert_close(found[r], x.detach(), rtol=0, atol=1e-12)
    fresh = play(task, FedAvg(local=local_sgd(task, steps=1, optimizer=rule)), rounds)
    assert not torch.allclose(fresh[-1], found[-1], atol=1e-3)


@pytest.mark.parametrize("name", ["Adam", "NAdam", "Adagrad", "RMSprop"])
def test_clients_that_are_alike_walk_as_one_that_never_stops(name: str) -> None:
    task = quadratic([[1.0, 2.0]] * 3, [[1.0, -1.0]] * 3, [0.0, 0.0])
    rule = {"name": name.lower(), "lr": 0.05, "state_scope": "server"}
    found = play(task, FedAvg(cohort_size=2, local=local_sgd(task, steps=3, optimizer=rule)), 4)
    x = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    options = {"eps": 1e-10} if name == "Adagrad" else {}
    central = getattr(torch.optim, name)([x], lr=0.05, **options)
    for r in range(4):
        for _ in range(3):
            x.grad = mean_gradient(task, x.detach())
            central.step()
        # torch keeps NAdam's product of factors in float32
        torch.testing.assert_close(found[r], x.detach(), rtol=0, atol=1e-8 if name == "NAdam" else 1e-12)


def test_what_the_server_keeps_is_the_mean_of_the_clients_states_by_their_samples() -> None:
    task = quadratic([1, 3], [0, 1], 2, num_examples=[1, 4])
    rule = {"name": "sgd", "lr": 0.1, "momentum": 0.5, "ema": True, "state_scope": "server"}
    p = Play.start(task, FedAvg(local=local_sgd(task, steps=1, optimizer=rule)))
    p.step()
    # gradients at 2 are 2 and 3, momentum starts at half of them; one step each
    assert p.state.local.tolist() == pytest.approx([1, (1 * 1.0 + 4 * 1.5) / 5])


def test_clients_without_samples_leave_the_state_as_it_is() -> None:
    task = quadratic([1, 3], [0, 1], 2, num_examples=[0, 0])
    rule = {"name": "adam", "lr": 0.1, "state_scope": "server"}
    p = Play.start(task, FedAvg(local=local_sgd(task, steps=2, optimizer=rule)))
    before = p.state.local.clone()
    p.step()
    assert torch.equal(p.state.local, before)


def test_packed_states_come_back_as_they_were() -> None:
    layout = Layout.of({"w": (3, 2), "b": (2,)})
    for name in ("adam", "nadam", "adafactor", "schedule_free_adamw", "muon", "adagrad_norm"):
        optimizer = build({"name": name, "lr": 0.1}, layout)
        x = torch.randn(3, layout.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        state, other = optimizer.init(x), optimizer.init(x)
        for _ in range(3):
            optimizer.step_(x[:2], x[:2].clone(), state)
        other.unpack_(state.pack(x))
        for key, rows in state.to_rows().items():
            assert torch.equal(rows, other.to_rows()[key]), (name, key)


def test_states_are_counted_as_traffic() -> None:
    history = fedsim.run(CONFIG, rounds=2)
    model, state = 4, 1 + 4 + 4  # t, m and v
    assert history.last("bits_up") == history.last("bits_down") == 2 * 3 * 32 * (model + state)


def test_the_state_takes_time_on_a_slow_link() -> None:
    seconds = {}
    for scope in ("round", "server"):
        raw = {
            **CONFIG,
            "clients": {"count": 5, "devices": {"name": "constant", "seconds_per_step": 0.0, "uplink": 1000.0}},
            "local": {"steps": 3, "optimizer": {"name": "adam", "lr": 0.05, "state_scope": scope}},
        }
        seconds[scope] = fedsim.run(raw, rounds=1).last("virtual_seconds")
    assert seconds["server"] == pytest.approx(seconds["round"] * (4 + 9) / 4)


@pytest.mark.parametrize("scope", ["client", "server"])
def test_states_survive_a_stop_and_do_not_depend_on_stacks(scope: str, tmp_path: Path) -> None:
    raw = {**CONFIG, "local": {"steps": 3, "optimizer": {"name": "adam", "lr": 0.05, "state_scope": scope}}}
    fedsim.run(raw, out=tmp_path / "whole")
    fedsim.run(raw, out=tmp_path / "parts", rounds=3)
    fedsim.run(raw, out=tmp_path / "parts", resume=True)
    assert (tmp_path / "whole/model.safetensors").read_bytes() == (tmp_path / "parts/model.safetensors").read_bytes()
    one, all_ = (fedsim.run(raw, **{"runtime.stack": width}).series("test_loss")[1] for width in (1, 5))
    assert one == pytest.approx(all_, rel=1e-5)


def test_the_three_scopes_differ_once_a_round_is_over() -> None:
    losses = {}
    for scope in ("round", "client", "server"):
        raw = {**CONFIG, "local": {"steps": 3, "optimizer": {"name": "adam", "lr": 0.05, "state_scope": scope}}}
        losses[scope] = fedsim.run(raw, **{"strategy.cohort_size": 5}).series("train_loss")[1]
    assert len({v[0] for v in losses.values()}) == 1
    assert len({v[-1] for v in losses.values()}) == 3


def test_a_robust_rule_takes_the_states_too() -> None:
    history = fedsim.run(CONFIG, **{"strategy.aggregator": "median"})
    assert history.last("test_loss") < history.series("test_loss")[1][0]


# Refusals ---------------------------------------------------------------------------------------------------------


def refusal(**changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        compose(*runs.load(CONFIG, changes))
    return str(caught.value)


def test_a_strategy_that_does_not_average_states_refuses_the_servers_scope() -> None:
    message = refusal(strategy={"name": "fedbuff", "buffer_size": 2})
    assert (
        "local.optimizer.state_scope: server is not for this strategy, which averages no states; take round" in message
    )


def test_states_do_not_go_through_a_compressor() -> None:
    message = refusal(**{"uplink.compressor": {"name": "top_k", "k": 2}})
    assert "local.optimizer.state_scope: server sends states that uplink.compressor does not fit" in message


def test_a_server_rule_has_no_scope() -> None:
    rule = {"name": "adam", "lr": 0.1, "state_scope": "client"}
    message = refusal(**{"strategy.server_optimizer": rule})
    assert "strategy.server_optimizer: state_scope is for local optimizers" in message
