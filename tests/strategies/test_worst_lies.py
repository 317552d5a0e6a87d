"""Lies among peers whose factor is sought against what honest peers make of them, beside a search by brute force."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from fedsim.aggregate.coordinatewise import TrimmedMean
from fedsim.clients.byzantine import Alie, InnerProduct
from fedsim.graph import Graph
from fedsim.sim.byzantine import Byzantine, Knowledge, held_back
from fedsim.strategies.bridge import Bridge
from fedsim.strategies.clipped_gossip import ClippedGossip
from fedsim.strategies.dsgd import DSGD
from fedsim.strategies.gradient_tracking import GradientTracking
from fedsim.strategies.monna import Monna
from fedsim.streams import Streams
from fedsim.topology.fixed import Complete, Ring, Torus
from tests.build import drawn, local_sgd
from tests.reference.peers import clipped, nearest, trimmed

N, LIARS = 12, [1, 6]
HONEST = [i for i in range(N) if i not in LIARS]
IDS = torch.arange(N)
LOCAL = local_sgd(drawn(N, 2), 0.1, steps=1)
Made = Callable[[Sequence[Tensor], int, Tensor], Tensor]  # of all vectors, a node and what others weigh for it [n]


def near(keep: int) -> Made:
    return lambda sent, i, w: nearest(sent, i, [j for j in range(N) if w[j] > 0], keep)


def averaged(sent: Sequence[Tensor], i: int, w: Tensor) -> Tensor:
    return sum((w[j] * sent[j] for j in range(N)), start=torch.zeros(3).double())


RULES: dict[str, tuple[Any, Made, Any, int]] = {
    "dsgd": (DSGD(local=LOCAL), averaged, Torus(), 0),
    "gradient tracking": (GradientTracking(local=LOCAL), averaged, Torus(), 0),
    "monna": (Monna(f=2, local=LOCAL), near(N - 2), Complete(), 0),
    "monna on a torus": (Monna(f=1, local=LOCAL), near(4), Torus(), 0),
    "monna, vectors held back": (Monna(f=2, arrival="adversarial", local=LOCAL), near(N - 4), Complete(), 2),
    "clipped gossip": (ClippedGossip(f=2, local=LOCAL), lambda v, i, w: clipped(v, i, w, 2, None), Complete(), 0),
    "clipped to a radius": (ClippedGossip(tau=0.5, local=LOCAL), lambda v, i, w: clipped(v, i, w, 0, 0.5), Torus(), 0),
    "bridge": (Bridge(aggregator=TrimmedMean(f=2), local=LOCAL), lambda v, i, w: trimmed(v, i, w, 2), Complete(), 0),
}


def vectors(seed: int = 0) -> Tensor:
    """[n, P], whose mean is short beside how far they lie apart, so that lies may be many times as long."""
    return 0.1 + torch.randn(N, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def heard_by(topology: Any, missing: int) -> Graph:
    links = topology.graph(N, 0, 0)
    good = torch.tensor([i in HONEST for i in range(N)])
    return held_back(Streams(0, IDS, torch.zeros_like(IDS)), links, good, missing) if missing else links


@pytest.mark.parametrize("attack", ["foe", "alie"])
@pytest.mark.parametrize("name", RULES)
def test_they_harm_as_much_as_the_worst_of_many_factors(name: str, attack: str) -> None:
    strategy, made, topology, missing = RULES[name]
    v, graph = vectors(), heard_by(topology, missing)
    weights, mean = graph.dense(N), v[HONEST].mean(0)
    along = -mean if attack == "foe" else v[HONEST].std(0)
    start = torch.zeros(3).double() if attack == "foe" else mean

    def harm(lie: Tensor) -> float:
        sent = [lie if i in LIARS else row for i, row in enumerate(v)]
        return float((torch.stack([made(sent, i, weights[i]) for i in HONEST]).mean(0) - mean).norm())

    kind: Any = InnerProduct(tau="optimised") if attack == "foe" else Alie(k="optimised")
    lies = Byzantine(ids=torch.tensor(LIARS), attack=kind, seed=0, mix=strategy.mixing())
    arrive, sent, heard = lies.tell(IDS, {"h": v}, graph, 0)
    lie = sent["h"][LIARS[0]]
    assert bool(arrive.all()) and heard is graph and torch.equal(sent["h"][HONEST], v[HONEST])
    assert torch.equal(lie, sent["h"][LIARS[1]])
    factor = float((lie - start) @ along / along.square().sum())
    torch.testing.assert_close(lie, start + factor * along)
    worst = max(harm(start + k * along) for k in torch.arange(41, dtype=torch.float64) / 2)
    assert factor >= 0 and harm(lie) > 0.85 * worst  # a search finds a peak, and not always the highest


@dataclass(frozen=True)
class Push:
    """Tells each peer, of so many vectors, the one that moves it farthest from where it is."""

    far: tuple[float, ...]
    on_data: ClassVar[bool] = False

    def to_each(self, own: Tensor, mean: Tensor, weight: Tensor, streams: Streams, known: Knowledge) -> Tensor:
        assert known.rule is not None
        best, worst = own, torch.full((len(own),), -inf, dtype=own.dtype)
        for far in self.far:
            moved = (known.rule(own + far) - own).norm(dim=1)
            best = torch.where((moved > worst)[:, None], own + far, best)
            worst = torch.maximum(moved, worst)
        return best

    def __call__(self, honest: Tensor, b: int, streams: Streams, known: Knowledge) -> Tensor | None:
        raise AssertionError("a server is not lied to")


def test_who_lies_to_each_peer_knows_what_each_would_make_of_it() -> None:
    # each hears the liar and two others on a ring of four; clipping to 1 lets it move a peer by a third at most
    rule: Any = ClippedGossip(tau=1.0, local=LOCAL, topology=Ring())
    lies = Byzantine(ids=torch.tensor([3]), attack=Push((0.5, 1.0, 7.0)), seed=0, mix=rule.mixing())
    v = torch.tensor([[0.0], [0.0], [4.0], [9.0]]).double()
    _, sent, heard = lies.tell(torch.arange(4), {"h": v}, Ring().graph(4, 0, 0), 0)
    assert sent["h"][4:].flatten().tolist() == [1.0, 4.5]  # peer 2 is pulled to 1 by a third, and least by a short lie
    torch.testing.assert_close(rule.combine(sent["h"], heard)[[0, 2]], torch.tensor([[1 / 3], [4 - 1 / 6]]).double())
