"""Peers on graphs: twins, what is left on a complete graph, who survives which lies, who is away, and what it costs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fedsim.aggregate.coordinatewise import Median
from fedsim.aggregate.neighbours import MultiKrum
from fedsim.clients.byzantine import Attack, Dissensus, Infinity, InnerProduct, NotANumber, SignFlip, Silence
from fedsim.compose import compose
from fedsim.config import ConfigError
from fedsim.sim.absence import Absence, Dropout
from fedsim.sim.byzantine import Byzantine
from fedsim.strategies.bridge import Bridge
from fedsim.strategies.clipped_gossip import ClippedGossip
from fedsim.strategies.dsgd import DSGD
from fedsim.strategies.fedavg import FedAvg
from fedsim.strategies.gradient_tracking import GradientTracking
from fedsim.strategies.monna import Monna
from fedsim.tasks.quadratic import QuadraticTask
from fedsim.topology.drawn import ErdosRenyi, RandomRegular
from fedsim.topology.fixed import Complete, Edges, Exponential, Ring, Torus
from tests.build import Play, drawn, local_sgd, play, quadratic
from tests.composition import pair
from tests.reference.peers import Weights, bridge, clipped_gossip, dsgd, gradient_tracking, monna
from tests.strategies.tasks import noisy

GRAPHS = [Torus(), Exponential(one_peer=True), RandomRegular(degree=4, redraw=2), ErdosRenyi(p=0.4, mixing="uniform")]


def lying(ids: list[int], attack: Attack) -> Byzantine:
    return Byzantine(ids=torch.tensor(ids), attack=attack, seed=0)


def models(play: Play) -> Tensor:
    """[n, P]: every peer's own model."""
    return play.fleet.memory.of(play.fleet.clients)["x"]


def matrices(topology: Any, n: int) -> Weights:
    return lambda t: topology.graph(n, 0, t).dense(n)


def paths(task: Any, strategy: Any, rounds: int, **options: Any) -> Tensor:
    """[rounds, n, P]: all models."""
    one = Play.start(task, strategy, width=2, **options)
    return torch.stack([(one.step(), models(one).clone())[1] for _ in range(rounds)])


def end(task: Any, strategy: Any, rounds: int, **options: Any) -> Tensor:
    """[n, P]: all models after some rounds."""
    one = Play.start(task, strategy, **options)
    one.path(rounds)
    return models(one)


# Twins -----------------------------------------------------------------------------------------------------------


FOE: tuple[Attack, Callable[[Tensor], Tensor]] = InnerProduct(tau=3.0), lambda mean: -3.0 * mean
CASES: list[tuple[Any, Any, dict[str, Any], Any, int]] = [
    *((DSGD, dsgd, {}, graph, 12) for graph in (*GRAPHS, Complete())),
    *((GradientTracking, gradient_tracking, {}, graph, 12) for graph in GRAPHS[:3]),
    *(
        (Monna, monna, {"beta": 0.7, "f": 1, "arrival": arrival}, Torus(), n)
        for arrival in ("all", "adversarial")
        for n in (12, 25)  # by a product of matrices, and pair by pair
    ),
    *(
        (ClippedGossip, clipped_gossip, {"beta": 0.7, "f": 1, "tau": tau}, graph, 12)
        for tau in (None, 0.5)
        for graph in (Torus(), ErdosRenyi(p=0.4))
    ),
    (Bridge, partial(bridge, f=1), {}, Torus(), 12),
]


@pytest.mark.parametrize("kind, plain, fields, topology, n", CASES, ids=[kind.__name__ for kind, *_ in CASES])
def test_it_equals_its_twin(kind: Any, plain: Any, fields: dict[str, Any], topology: Any, n: int) -> None:
    task, clients = noisy(steps=1, clients=n)
    liars = [] if kind in (DSGD, GradientTracking) else [1, 6]
    lies = {"byzantine": liars, "attack": FOE[1]} if liars else {}
    strategy = kind(local=local_sgd(task, 0.2, steps=1), topology=topology, **fields)
    got = paths(task, strategy, 8, byzantine=lying(liars, FOE[0]) if liars else None)
    expected = plain(clients, task.x0, 8, lr=0.2, weights=matrices(topology, n), **fields, **lies)
    honest = [i for i in range(n) if i not in liars]
    torch.testing.assert_close(got[:, honest], expected[:, honest], rtol=0, atol=1e-12)


# What is left of them --------------------------------------------------------------------------------------------


def test_on_a_complete_graph_mixing_is_that_of_one_server() -> None:
    task, _ = noisy(steps=1)
    local = local_sgd(task, 0.1, steps=1)
    expected = play(task, FedAvg(local=local), 8)
    for strategy in (DSGD(local=local), GradientTracking(local=local), ClippedGossip(beta=0.0, local=local)):
        torch.testing.assert_close(play(task, strategy, 8), expected, rtol=0, atol=1e-12)


def test_clipped_gossip_that_clips_nothing_is_dsgd_with_momentum() -> None:
    task, _ = noisy(steps=1, clients=12)
    local, torus = local_sgd(task, 0.1, steps=1), Torus()
    plain = play(task, DSGD(local=local, topology=torus), 6)
    for strategy in (
        ClippedGossip(beta=0.0, local=local, topology=torus),
        ClippedGossip(beta=0.0, tau=1e9, local=local, topology=torus),
        Monna(beta=0.0, local=local, topology=torus),
    ):
        torch.testing.assert_close(play(task, strategy, 6), plain, rtol=0, atol=1e-12)


def test_the_sum_of_trackers_is_the_sum_of_everybodys_last_gradients() -> None:
    task, _ = noisy(steps=1, clients=12)
    for topology in GRAPHS[:3]:
        one = Play.start(task, GradientTracking(local=local_sgd(task, 0.1, steps=1), topology=topology))
        for _ in range(6):
            one.step()
            y, g = (one.fleet.memory.of(one.fleet.clients)[name].sum(0) for name in "yg")
            torch.testing.assert_close(y, g, rtol=0, atol=1e-11)


def test_gradient_tracking_reaches_the_common_optimum_and_dsgd_stalls() -> None:
    task = drawn(6, 3)
    local, optimum = local_sgd(task, 0.2, steps=1), (task.a * task.b).sum(0) / task.a.sum(0)
    ends = [end(task, kind(local=local, topology=Ring()), 200) for kind in (DSGD, GradientTracking)]
    away = [float((models - optimum).norm(dim=1).max()) for models in ends]
    assert away[1] < 1e-9 and away[0] > 0.05


# Lies ------------------------------------------------------------------------------------------------------------


def far() -> QuadraticTask:
    """Minimisers around (3, ..., 3), so that a flipped sign points elsewhere."""
    task = drawn(16, 3)
    task.b = task.b + 3
    return task


def worst(task: QuadraticTask, strategy: Any, attack: Attack) -> float:
    """How far the worst honest peer ends from the honest optimum; peers 5 and 10 of 16 lie."""
    honest = [i for i in range(16) if i not in (5, 10)]
    optimum = (task.a * task.b)[honest].sum(0) / task.a[honest].sum(0)
    found = end(task, strategy, 40, byzantine=lying([5, 10], attack))[honest]
    return float((found - optimum).norm(dim=1).max())


@pytest.mark.parametrize("attack", [SignFlip(), InnerProduct(tau=20.0), Infinity(), NotANumber(), Silence()])
def test_robust_gossip_survives_where_dsgd_does_not(attack: Attack) -> None:
    task, regular = far(), RandomRegular(degree=7)
    local = local_sgd(task, 0.1, steps=1)
    for strategy in (
        Monna(beta=0.0, f=2, local=local, topology=regular),
        ClippedGossip(beta=0.0, f=2, local=local, topology=regular),
        Bridge(aggregator=Median(), local=local, topology=regular),
        Bridge(aggregator=MultiKrum(f=2), local=local, topology=regular),
    ):
        assert worst(task, strategy, attack) < 2.5, type(strategy)  # the start is five away
    if not isinstance(attack, Silence):
        assert not worst(task, DSGD(local=local, topology=regular), attack) < 3


def test_every_peer_is_told_something_else() -> None:
    # peer 1 of a path 0 - 1 - 2 lies to 0 and 2: with epsilon=1 what each hears leaves it where it stands
    task, path = quadratic([1.0] * 3, [0.0, 5.0, 9.0], 0.0), Edges(edges=((0, 1), (1, 2)))
    strategy = DSGD(local=local_sgd(task, 0.1, steps=1), topology=path)
    got = paths(task, strategy, 1, byzantine=lying([1], Dissensus(epsilon=1.0)))
    assert got[0, [0, 2], 0].tolist() == pytest.approx([0.0, 0.9])


def test_dissensus_undoes_what_honest_neighbours_say() -> None:
    # on a ring of four with one liar, peers 0 and 2 hear one honest neighbour and the liar, who weighs as much
    task, ring = quadratic([1.0] * 4, [0.0, 4.0, 8.0, 20.0], 0.0), Ring()
    one = Play.start(task, DSGD(local=local_sgd(task, 0.1, steps=1), topology=ring), byzantine=lying([3], Dissensus()))
    one.step()
    h = torch.tensor([0.0, 0.4, 0.8])
    assert models(one)[:3, 0].tolist() == pytest.approx([float(h[0]), float(h.mean()), float(h[2])])
    assert one.fleet.ledger.bits_up == 4 * 2 * 32 and one.fleet.ledger.bits_down == 4 * 32 + 4 * 2 * 32


def test_the_silent_are_not_heard_and_their_weight_is_ones_own() -> None:
    task, ring = quadratic([1.0] * 4, [0.0, 4.0, 8.0, 20.0], 0.0), Ring()
    one = Play.start(task, DSGD(local=local_sgd(task, 0.1, steps=1), topology=ring), byzantine=lying([3], Silence()))
    one.step()
    assert models(one)[:3, 0].tolist() == pytest.approx([0.4 / 3, 0.4, (0.4 + 2 * 0.8) / 3])
    assert one.fleet.ledger.bits_up == 3 * 2 * 32


def test_who_hears_too_few_in_a_step_keeps_its_own() -> None:
    task, sparse = drawn(8, 2), ErdosRenyi(p=0.25, redraw=1)
    local = local_sgd(task, 0.1, steps=1)
    alone = sparse.graph(8, 0, 1).counts <= 2  # in the second step: before the first all models are the same
    assert bool(alone.any()) and not bool(alone.all())
    for strategy in (
        Monna(beta=0.0, f=1, local=local, topology=sparse),
        ClippedGossip(beta=0.0, f=1, local=local, topology=sparse),
        Bridge(local=local, topology=sparse),
    ):
        before, got = paths(task, strategy, 2)
        half = before - 0.1 * task.a * (before - task.b)
        torch.testing.assert_close(got[alone], half[alone], rtol=0, atol=1e-12)
        assert not torch.allclose(got[~alone], half[~alone], atol=1e-3)


# Who is away, and what it costs -----------------------------------------------------------------------------------


def test_who_is_not_there_stands_still_and_the_others_keep_their_mean() -> None:
    task = quadratic([0.0] * 8, [0.0] * 8, 1.0)  # nothing pulls: only mixing moves
    absence = Absence(dropout=Dropout(probability=0.4), seed=0)
    one = Play.start(task, DSGD(local=local_sgd(task, 0.1, steps=1), topology=Ring()), absence=absence)
    while one.state.x0 is not None:
        one.step()
    one.fleet.memory.write(one.fleet.clients, {"x": torch.arange(8.0).double()[:, None]})
    stood, came = 0, 0
    for _ in range(12):
        before = models(one).clone()
        one.step()
        stood, came = stood + int((models(one) == before).all(1).sum()), came + int(one.seen["num_clients"])
        assert float(models(one).mean()) == pytest.approx(3.5, abs=1e-12)
    assert 0 < came < 96 and stood >= 96 - came
    assert float((models(one) - 3.5).abs().max()) < 2.5


def test_who_comes_late_begins_at_the_start() -> None:
    task = quadratic([1.0] * 6, [1.0] * 6, 3.0)
    one = Play.start(
        task, DSGD(local=local_sgd(task, 0.5, steps=1)), absence=Absence(dropout=Dropout(probability=0.6), seed=1)
    )
    one.step()
    late = ~one.state.joined
    assert bool(late.any()) and not bool(late.all())
    assert one.path(40)[-1].tolist() == pytest.approx([1.0], abs=1e-3)
    assert one.state.x0 is None


def test_each_sends_one_copy_to_each_neighbour() -> None:
    task = drawn(12, 3)
    for topology, links in ((Ring(), 24), (Torus(), 48), (Complete(), 132), (Exponential(one_peer=True), 12)):
        one = Play.start(task, DSGD(local=local_sgd(task, 0.1, steps=1), topology=topology))
        one.step()
        assert one.fleet.ledger.bits_up == links * 3 * 32
        assert one.fleet.ledger.bits_down == (links + 12) * 3 * 32
    one = Play.start(task, GradientTracking(local=local_sgd(task, 0.1, steps=1), topology=Ring()))
    one.step()
    assert one.fleet.ledger.bits_up == 2 * 24 * 3 * 32


# What is refused --------------------------------------------------------------------------------------------------

STAR = {"name": "edges", "edges": [[0, i] for i in range(1, 8)]}


@pytest.mark.parametrize(
    "strategy, fields, message",
    [
        ("dsgd", {"topology": "hypercub"}, ".topology.name: unknown name 'hypercub'; did you mean 'hypercube'?"),
        ("dsgd", {"topology": {"name": "torus", "rows": 3}}, ".topology: a torus has two rows or more .*: rows=3"),
        ("dsgd", {"topology": {"name": "edges", "edges": [[0, 1]]}}, r".topology: .* falls into 7 parts: \{0, 1\}, "),
        ("monna", {"topology": "ring", "f": 2}, ".f: 2 is too large for peer 0, which hears 3 vectors"),
        ("clipped_gossip", {"topology": STAR, "f": 1}, ".f: 1 is too large for peer 1, which has 1 neighbours"),
        ("bridge", {"topology": STAR}, ".aggregator: does not fit the 2 vectors that peer 1 hears, .*n=2"),
        ("gradient_tracking", {"topology": {**STAR, "mixing": "uniform"}}, ".topology: .* peer 0 sends counts 3.625"),
        ("fedavg", {"topology": "ring"}, ".topology: unknown key"),
        ("monna", {"beta": 1.0}, r": beta must lie in \[0, 1\), got 1.0"),
        ("clipped_gossip", {"f": -1}, ": f must not be negative, got -1"),
        ("clipped_gossip", {"tau": 0.0}, ": tau must be a positive length or null, got 0.0"),
    ],
)
def test_what_does_not_fit_the_graph_or_means_nothing_is_refused(
    strategy: str, fields: dict[str, Any], message: str
) -> None:
    raw = pair(strategy, None)
    with pytest.raises(ConfigError, match="file: strategy" + message):
        compose({**raw, "strategy": {**raw["strategy"], **fields}}, "file").close()


def test_lies_to_each_peer_need_peers() -> None:
    lies = {"byzantine": {"attack": "dissensus", "count": 1}}
    compose({**pair("dsgd", None), "clients": {"count": 8, **lies}}, "file").close()
    with pytest.raises(ConfigError, match="clients.byzantine.attack: dissensus tells each peer something else"):
        compose({**pair("fedavg", None), "clients": {"count": 8, **lies}}, "file").close()
