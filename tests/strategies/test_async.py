"""Asynchronous schemes against event loops written naively, their special cases, and the problem they solve."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from fedsim.aggregate.coordinatewise import TrimmedMean
from fedsim.aggregate.prepare import Clipping
from fedsim.compress.sparsify import RandK
from fedsim.optim import build
from fedsim.sim.devices import Exponential
from fedsim.sim.links import Downlink
from fedsim.strategies.async_fedavg import AsyncFedAvg
from fedsim.strategies.fedasync import FedAsync
from fedsim.strategies.fedavg import FedAvg
from fedsim.strategies.fedbuff import FedBuff
from fedsim.strategies.fedbuff_stream import FedBuffStream
from fedsim.strategies.fedfix import FedFix
from fedsim.tasks.models import mlp
from fedsim.tasks.quadratic import QuadraticTask
from tests.build import Clocks, Play, digits_task, drawn, f_80, local_sgd, play, quadratic
from tests.reference import asynchronous as twin
from tests.reference.clients import Formulas, stream
from tests.strategies.tasks import noisy

TAU = (1.0, 0.83, 0.61, 0.37, 0.2)
T80 = twin.constant(f_80())
WINDOW = [0.4, 0.4, 0.4, 0.2, 0.2]
ETA = 0.05


def _exponential(client: int, job: int) -> float:
    """Mean F-80 times, drawn from the same stream as the simulator's."""
    u = stream(0, client, job).uniform("job", 1, dtype=torch.float64)[0, 0]
    return float(-(1 - 80 / 100 * (torch.tensor(client).double() / 4)) * torch.log1p(-u))


CLOCKS = [(Clocks(TAU), twin.constant(TAU)), (Exponential(mean=1.0, x=80, count=5), _exponential)]
clocks = pytest.mark.parametrize("devices, tau", CLOCKS, ids=["fixed", "exponential"])


Seen = dict[str, torch.Tensor]
"""Model [R, P], number of replies, mean staleness and time [R] after each of R aggregations."""


def _simulated(strategy: Any, task: QuadraticTask, devices: Any, rounds: int) -> Seen:
    play = Play.start(task, strategy, devices=devices)
    models, rest = [], []
    for _ in range(rounds):
        models.append(play.path(1)[0])
        seen = play.seen
        rest.append((seen["num_clients"], seen.get("staleness_mean", 0.0), play.fleet.now))
    replies, staleness, time = torch.tensor(rest, dtype=torch.float64).T
    return {"x": torch.stack(models), "replies": replies, "staleness": staleness, "time": time}


def _expected(trace: twin.Trace) -> Seen:
    late = [sum(s) / max(len(s), 1) for s in trace.staleness]
    rest = torch.tensor([[len(w) for w in trace.who], late, trace.time], dtype=torch.float64)
    return {"x": trace.path(), "replies": rest[0], "staleness": rest[1], "time": rest[2]}


@clocks
def test_async_fedavg_equals_its_event_loop(devices: Any, tau: Callable[[int, int], float]) -> None:
    task, clients = noisy(steps=3)
    seconds = (3.0, 2.0, 5.0, 1.0, 4.0)  # said by hand, whatever the clocks are
    d = [sum(1 / s for s in seconds) * s / 5 for s in seconds]
    strategy = AsyncFedAvg(job_seconds=seconds, local=local_sgd(task, ETA, steps=3))
    expected = twin.async_fedavg(clients, task.x0, 40, tau=tau, d=d, eta=ETA)
    assert_close(_simulated(strategy, task, devices, 40), _expected(expected), rtol=0, atol=1e-12)


@clocks
@pytest.mark.parametrize("interval", [0.15, 0.5, 1.7])
def test_fedfix_equals_its_event_loop(devices: Any, tau: Callable[[int, int], float], interval: float) -> None:
    task, clients = noisy(steps=3)
    strategy = FedFix(interval=interval, weights="identical", local=local_sgd(task, ETA, steps=3))
    expected = twin.fedfix(clients, task.x0, 30, tau=tau, d=[0.2] * 5, interval=interval, eta=ETA)
    assert_close(_simulated(strategy, task, devices, 30), _expected(expected), rtol=0, atol=1e-12)
    if interval < 0.2:
        assert [] in expected.who  # a window without arrivals counts as an aggregation that changes nothing


@clocks
@pytest.mark.parametrize("size", [1, 2, 5])
def test_fedbuff_equals_its_event_loop(devices: Any, tau: Callable[[int, int], float], size: int) -> None:
    task, clients = noisy(steps=3)
    strategy = FedBuff(buffer_size=size, local=local_sgd(task, ETA, steps=3))
    expected = twin.fedbuff(clients, task.x0, 20, tau=tau, d=[1 / size] * 5, size=size, eta=ETA)
    assert_close(_simulated(strategy, task, devices, 20), _expected(expected), rtol=0, atol=1e-12)


@clocks
@pytest.mark.parametrize("size, concurrency, exponent", [(1, 3, 0.5), (3, 4, 0.5), (2, 5, 0.0), (4, 2, 1.0)])
def test_fedbuff_stream_equals_its_event_loop(
    devices: Any, tau: Callable[[int, int], float], size: int, concurrency: int, exponent: float
) -> None:
    task, clients = noisy(steps=3)
    rule = {"buffer_size": size, "concurrency": concurrency, "exponent": exponent}
    strategy = FedBuffStream(**rule, local=local_sgd(task, ETA, steps=3))  # type: ignore[arg-type]
    expected = twin.fedbuff_stream(
        clients, task.x0, 15, tau=tau, size=size, concurrency=concurrency, exponent=exponent, eta=ETA
    )
    assert_close(_simulated(strategy, task, devices, 15), _expected(expected), rtol=0, atol=1e-12)


# Special cases ---------------------------------------------------------------------------------------------------


def _sync(task: QuadraticTask, rounds: int = 12) -> torch.Tensor:
    return play(task, FedAvg(local=local_sgd(task, ETA, steps=3)), rounds)


@pytest.mark.parametrize("weights", ["unbiased", "identical"])
@pytest.mark.parametrize("interval", [1.0, 1.3])
def test_a_window_longer_than_every_job_is_synchronous_fedavg(weights: Any, interval: float) -> None:
    task, _ = noisy(steps=3)
    play = Play.start(
        task, FedFix(interval=interval, weights=weights, local=local_sgd(task, ETA, steps=3)), devices=Clocks(TAU)
    )
    assert_close(play.path(12), _sync(task), rtol=0, atol=1e-12)
    assert play.fleet.now == pytest.approx(12 * interval)


@pytest.mark.parametrize("weights", ["unbiased", "identical"])
def test_a_buffer_of_all_clients_is_synchronous_fedavg_at_the_same_times(weights: Any) -> None:
    task, _ = noisy(steps=3)
    devices = Clocks(TAU)
    ours = Play.start(
        task, FedBuff(buffer_size=5, weights=weights, local=local_sgd(task, ETA, steps=3)), devices=devices
    )
    theirs = Play.start(task, FedAvg(local=local_sgd(task, ETA, steps=3)), devices=devices)
    assert_close(ours.path(12), theirs.path(12), rtol=0, atol=1e-12)
    assert ours.fleet.now == theirs.fleet.now == pytest.approx(12.0)


def test_equal_clocks_and_a_window_of_one_job_are_synchronous_fedavg() -> None:
    task, _ = noisy(steps=3)
    strategy = FedFix(interval=0.7, local=local_sgd(task, ETA, steps=3))
    assert_close(play(task, strategy, 12, devices=Clocks((0.7,) * 5)), _sync(task), rtol=0, atol=1e-12)


def test_equal_clocks_and_half_a_window_are_synchronous_with_a_doubled_step() -> None:
    task, _ = noisy(steps=3)
    x = play(task, FedFix(interval=0.5, local=local_sgd(task, ETA, steps=3)), 12, devices=Clocks((1.0,) * 5))
    doubled = play(task, FedAvg(server_lr=2.0, local=local_sgd(task, ETA, steps=3)), 6)
    assert_close(x[1::2], doubled, rtol=0, atol=1e-12)
    assert_close(x[2::2], x[1:-1:2], rtol=0, atol=0)


def test_equal_clocks_make_async_contributions_cycle() -> None:
    task, _ = noisy(steps=3)
    play = Play.start(task, AsyncFedAvg(local=local_sgd(task, 0.01, steps=3)), devices=Clocks((1.0,) * 5))
    staleness, order = [], []
    for _ in range(20):
        play.step()
        order.append(int(play.state.idle[0]))
        staleness.append(play.seen.get("staleness_mean", 0.0))
    assert order == [0, 1, 2, 3, 4] * 4
    assert staleness[:5] == [0, 1, 2, 3, 4] and set(staleness[5:]) == {4}


def test_one_client_is_local_sgd_restarted_whatever_the_scheme() -> None:
    task = quadratic([2], [1], 3, noise=0.2)
    local = local_sgd(task, 0.1, steps=4)
    devices = Clocks((0.5,))
    expected = play(task, FedAvg(local=local), 6)
    for strategy in (
        AsyncFedAvg(local=local),
        FedAsync(alpha=1.0, local=local),  # fully trusted
        FedFix(interval=0.5, local=local),
        FedBuff(buffer_size=1, local=local),
        FedBuffStream(buffer_size=1, concurrency=1, local=local),
    ):
        assert_close(play(task, strategy, 6, devices=devices), expected, rtol=0, atol=1e-12)


def test_a_buffer_of_tied_clocks_solves_the_problem_with_unbiased_weights() -> None:
    task = quadratic([1.0] * 5, [0.0, 1, 2, 3, 4], 2.0)
    strategy = FedBuff(buffer_size=2, weights="unbiased", local=local_sgd(task, 1e-2, steps=1))
    x = play(task, strategy, 600, devices=Clocks((1.0,) * 5))[500:]
    assert float(x.mean()) == pytest.approx(2.0, abs=2e-3)


@pytest.mark.parametrize("pre", [None, (Clipping(norm=1e9),)], ids=["rule", "rule behind another"])
def test_rules_that_are_means_in_disguise_change_nothing(pre: Any) -> None:
    # a trimmed mean that trims nothing gets the rows R d_i v_i, whose mean is the sum of d_i v_i
    task, _ = noisy(steps=3)
    local = local_sgd(task, ETA, steps=3)
    schemes: list[Callable[..., Any]] = [
        lambda **rule: AsyncFedAvg(local=local, **rule),
        lambda **rule: FedFix(interval=0.5, local=local, **rule),
        lambda **rule: FedBuff(buffer_size=3, weights="unbiased", local=local, **rule),
        lambda **rule: FedBuffStream(buffer_size=3, concurrency=4, local=local, **rule),
    ]
    for make in schemes:
        plain = play(task, make(), 12, devices=Clocks(TAU))
        rule = make(aggregator=TrimmedMean(f=0), pre_aggregators=pre)
        assert_close(play(task, rule, 12, devices=Clocks(TAU)), plain, rtol=0, atol=1e-12)


def test_a_window_that_a_robust_rule_cannot_judge_changes_nothing() -> None:
    task, _ = noisy(steps=3)
    strategy = FedFix(interval=0.3, aggregator=TrimmedMean(f=1), local=local_sgd(task, ETA, steps=3))
    game = Play.start(task, strategy, devices=Clocks(TAU))
    before, few = game.state.x, []
    for _ in range(8):
        few.append("too_few" in game.step())
        assert torch.equal(game.state.x, before) is (few[-1] or len(game.state.idle) == 0)
        before = game.state.x
    assert True in few and False in few


@pytest.mark.parametrize("scheme", ["fedfix", "fedbuff"])
def test_a_servers_rule_steps_alike_under_synchronous_and_buffered_schemes(scheme: str) -> None:
    # everybody is in every aggregation, so that the scheme is FedAvg; the rule is FedAvg's
    task, _ = noisy(steps=3)
    local = local_sgd(task, ETA, steps=3)
    rule = build({"name": "adam", "lr": 0.1}, task.layout)
    ours = FedFix(interval=1.0, server_optimizer=rule, local=local)
    buffered = FedBuff(buffer_size=5, server_optimizer=rule, local=local)
    x = play(task, ours if scheme == "fedfix" else buffered, 12, devices=Clocks(TAU))
    assert_close(x, play(task, FedAvg(server_optimizer=rule, local=local), 12), rtol=0, atol=1e-12)
    assert not torch.allclose(x, _sync(task))


# What they converge to -------------------------------------------------------------------------------------------


def _spread() -> tuple[QuadraticTask, Formulas]:
    """Five clients with a_i = (1..5)/5 and b = (0..4): the optimum is 8/3."""
    a, b = [0.2, 0.4, 0.6, 0.8, 1.0], [0.0, 1, 2, 3, 4]
    return quadratic(a, b, 0.0), Formulas(torch.tensor(a).double()[:, None], torch.tensor(b).double()[:, None], 1)


SCHEMES: list[tuple[Callable[..., Any], float]] = [
    (lambda local: AsyncFedAvg(local=local), 2.66679),
    (lambda local: FedFix(interval=0.5, local=local), 2.66679),
    (lambda local: FedFix(interval=0.2, local=local), 8 / 3),
    (lambda local: FedBuff(buffer_size=2, weights="unbiased", local=local), 2.6562),
]


@pytest.mark.parametrize("make, target", SCHEMES, ids=["async", "fedfix .5", "fedfix .2", "fedbuff"])
def test_stationary_mean_with_f_80_clocks_is_as_worked_out(make: Callable[..., Any], target: float) -> None:
    task, _ = _spread()
    assert float(task.solution()) == pytest.approx(8 / 3)
    task.x0 = torch.tensor([target], dtype=torch.float64)  # stays where it starts, but for eta
    x = play(task, make(local_sgd(task, 2e-3, steps=1)), 700, devices=Clocks(f_80()))[200:]
    assert float(x.mean()) == pytest.approx(target, abs=4e-3)


def test_identical_weights_solve_the_surrogate_problem() -> None:
    task, _ = _spread()
    a, b = task.a[:, 0], task.b[:, 0]
    tau = torch.tensor(f_80(), dtype=torch.float64)
    surrogate = float((a * b / tau).sum() / (a / tau).sum())
    assert surrogate == pytest.approx(3.27586, abs=5e-6)
    task.x0 = torch.tensor([surrogate], dtype=torch.float64)
    strategy = AsyncFedAvg(weights="identical", local=local_sgd(task, 4e-4, steps=1))
    x = play(task, strategy, 700, devices=Clocks(f_80()))[200:]
    assert float(x.mean()) == pytest.approx(surrogate, abs=2e-3)
    assert float(x.mean()) - 8 / 3 > 0.5


def test_a_buffer_with_identical_weights_solves_the_surrogate_of_its_own_schedule() -> None:
    # Clocks 5, 4, 3, 2, 1 tie often; sent earlier comes first. As 1, 0.8, ... seconds they tie only up to rounding,
    # which moves the shares with the length of the run: 3.14488, often quoted, is the surrogate of such a schedule.
    task, _ = _spread()
    back, taken = [5.0, 4, 3, 2, 1], [0] * 5
    for _ in range(5600):
        first = sorted(range(5), key=lambda i: back[i])[:2]
        now = max(back[i] for i in first)
        for i in first:
            taken[i], back[i] = taken[i] + 1, now + 5 - i
    share = torch.tensor(taken).double()
    a, b = task.a[:, 0], task.b[:, 0]
    surrogate = float((share * a * b).sum() / (share * a).sum())
    assert surrogate == pytest.approx(3.08502, abs=1e-4)
    task.x0 = torch.tensor([surrogate], dtype=torch.float64)
    strategy = FedBuff(buffer_size=2, local=local_sgd(task, 4e-4, steps=1))
    x = play(task, strategy, 700, devices=Clocks((5.0, 4.0, 3.0, 2.0, 1.0)))[200:]
    assert float(x.mean()) == pytest.approx(surrogate, abs=2e-3)


@pytest.mark.parametrize(
    "make, target, eta",
    [
        (lambda c, x, n, eta: twin.async_fedavg(c, x, n, tau=T80, d=_async_weights(), eta=eta), 2.66679, 2e-3),
        (lambda c, x, n, eta: twin.fedfix(c, x, n, tau=T80, d=WINDOW, interval=0.5, eta=eta), 2.66679, 2e-3),
        (lambda c, x, n, eta: twin.async_fedavg(c, x, n, tau=T80, d=[1.0] * 5, eta=eta), 3.27582, 4e-4),
    ],
    ids=["async", "fedfix", "async identical"],
)
def test_the_event_loops_reach_the_published_tail_means(
    make: Callable[..., twin.Trace], target: float, eta: float
) -> None:
    _, clients = _spread()
    x = make(clients, torch.tensor([target], dtype=torch.float64), 3000, eta).path()[1000:]
    assert float(x.mean()) == pytest.approx(target, abs=3e-3)


def _async_weights() -> list[float]:
    h = sum(1 / t for t in f_80())
    return [h * t / 5 for t in f_80()]


@pytest.mark.parametrize(
    "make, below, above",
    [
        (lambda local: FedFix(interval=1.0, local=local), 1.95, 2.1),
        (lambda local: FedFix(interval=0.5, local=local), 1.0, 1.25),
        (lambda local: FedFix(interval=0.2, local=local), 0.5, 0.75),
        (lambda local: AsyncFedAvg(local=local), 0.05, 0.15),
    ],
    ids=["sync", "fedfix .5", "fedfix .2", "async"],
)
def test_staleness_limits_the_step_that_is_stable(make: Callable[..., Any], below: float, above: float) -> None:
    m = 20
    task = quadratic([1.0] * m, [0.0] * m, 1.0)
    for eta, stable in ((below, True), (above, False)):
        x = play(task, make(local_sgd(task, eta, steps=1)), 200, devices=Clocks(f_80(m)))[:, 0].abs()
        assert bool(x[-40:].max() < x[:40].max()) is stable, (eta, float(x[-40:].max()))


# Ordinary troubles -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda local: AsyncFedAvg(local=local),
        lambda local: FedAsync(local=local),
        lambda local: FedFix(interval=0.5, local=local),
        lambda local: FedBuff(buffer_size=2, local=local),
        lambda local: FedBuff(buffer_size=2, weights="unbiased", local=local),
        lambda local: FedBuffStream(buffer_size=2, concurrency=3, local=local),
    ],
    ids=["async", "fedasync", "fedfix", "fedbuff", "fedbuff unbiased", "stream"],
)
def test_clients_without_data_neither_stop_the_clock_nor_enter_the_model(make: Callable[..., Any]) -> None:
    full, some = digits_task(mlp, [4, 9, 6]), digits_task(mlp, [4, 9, 6, 0, 0])
    local = local_sgd(full, 0.1, epochs=1, steps=None, batch_size=4)
    one, other = Play.start(full, make(local)), Play.start(some, make(local))
    assert_close(one.path(6), other.path(6), rtol=0, atol=0)
    assert one.fleet.now == other.fleet.now > 0


def test_a_schedule_counts_the_round_in_which_each_job_was_sent() -> None:
    # with windows of 0.15 s one stack holds jobs that were sent in different rounds, at different rates
    task = quadratic([1.0] * 5, [0.0] * 5, 1.0)
    rule = {"name": "sgd", "lr": 0.1, "schedule": {"name": "exponential", "gamma": 0.5}}
    strategy = FedFix(interval=0.15, weights="identical", local=local_sgd(task, steps=1, optimizer=rule))
    x = play(task, strategy, 14, devices=Clocks(TAU))[:, 0].tolist()
    models, sent, back, expected = [1.0], [0] * 5, list(TAU), []
    for n in range(14):
        now, new = (n + 1) * 0.15, models[-1]
        for i in range(5):
            if back[i] <= now + 1e-9:
                new -= 0.2 * 0.1 * 0.5 ** sent[i] * models[sent[i]]
                sent[i], back[i] = n + 1, now + TAU[i]
        models.append(new)
        expected.append(new)
    assert x == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("interval", [0.0, -1.0])
def test_an_interval_that_is_not_positive_is_refused(interval: float) -> None:
    with pytest.raises(ValueError, match="interval must be positive seconds"):
        FedFix(interval=interval, local=local_sgd(quadratic([1], [0], 0)))


@pytest.mark.parametrize(
    "make",
    [
        lambda local: FedFix(interval=0.5, local=local),
        lambda local: AsyncFedAvg(local=local),
        lambda local: FedBuff(buffer_size=2, weights="unbiased", local=local),
    ],
    ids=["fedfix", "async", "fedbuff"],
)
def test_unbiased_weights_are_exact_where_jobs_bring_the_messages_that_were_missed(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # ten messages are as long as the model; how many a slow client is sent varies, and some windows send none
    steps = 150
    monkeypatch.setattr("fedsim.strategies.clocks.STEPS", steps)
    monkeypatch.setattr("fedsim.strategies.clocks.JOBS", 0)
    task = drawn(5, 40)
    game = Play.start(
        task,
        make(local_sgd(task, 1e-4, steps=1)),
        devices=Clocks((1.0, 0.83, 0.57, 0.41, 0.23), downlink=400.0),
        downlink=Downlink(compressor=RandK(k=4), seed=0),
    )
    taken = torch.zeros(5).double()
    for _ in range(steps):
        game.step()
        taken[game.state.idle] += 1
    assert (game.state.d * taken / steps).tolist() == pytest.approx([0.2] * 5, rel=1e-12)
