"""Topologies: networkx's graphs, weights that keep means, gaps in closed form, and what is refused."""

from __future__ import annotations

from math import cos, pi
from pathlib import Path
from typing import Any

import networkx as nx
import pytest
import torch

from fedsim.topology import TOPOLOGIES, spectral_gap

CASES: dict[str, dict[str, Any]] = {
    "complete": {},
    "ring": {},
    "torus": {},
    "hypercube": {},
    "exponential": {},
    "random_regular": {},
    "erdos_renyi": {},
    "edges": {"edges": (*((i, i + 1) for i in range(15)), (0, 8), (3, 11))},
}
N = 16


def edges_of(graph: Any) -> set[tuple[int, int]]:
    pairs = zip(graph.hearers.tolist(), graph.peers.tolist(), strict=True)
    return {(i, j) for i, j in pairs if i != j}


def both(drawing: nx.Graph) -> set[tuple[int, int]]:
    whole = nx.convert_node_labels_to_integers(drawing, ordering="sorted")
    return set(whole.edges) | {(j, i) for i, j in whole.edges}


def test_every_topology_has_a_case() -> None:
    assert CASES.keys() == TOPOLOGIES.keys()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("n", [1, 2, 4, N])
def test_metropolis_weights_keep_the_mean_and_are_the_same_both_ways(name: str, n: int) -> None:
    if (name == "edges" and n < N) or (name == "torus" and n < 4) or (name == "random_regular" and n < 4):
        pytest.skip("no such graph")
    matrix = TOPOLOGIES[name](**CASES[name]).graph(n, 0, 0).dense(n)
    for ones in (matrix.sum(0), matrix.sum(1)):
        torch.testing.assert_close(ones, torch.ones(n).double(), rtol=0, atol=1e-12)
    assert bool((matrix >= 0).all())
    if name != "exponential":  # whose links are one-way
        torch.testing.assert_close(matrix, matrix.T, rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    "name, settings, drawing",
    [
        ("complete", {}, nx.complete_graph(12)),
        ("ring", {}, nx.cycle_graph(12)),
        ("torus", {}, nx.grid_2d_graph(3, 4, periodic=True)),
        ("torus", {"rows": 2}, nx.grid_2d_graph(2, 6, periodic=True)),
        ("hypercube", {}, nx.hypercube_graph(3)),
        ("edges", {"edges": ((0, 1), (1, 2), (2, 0))}, nx.cycle_graph(3)),
    ],
)
def test_links_are_those_of_networkx(name: str, settings: dict[str, Any], drawing: nx.Graph) -> None:
    graph = TOPOLOGIES[name](**settings).graph(len(drawing), 0, 0)
    assert edges_of(graph) == {(i, j) for i, j in both(drawing) if i != j}


def gap(name: str, n: int, **settings: Any) -> float:
    topology = TOPOLOGIES[name](**settings)
    found = spectral_gap([topology.graph(n, 0, step) for step in range(topology.period(n))])
    assert found is not None
    return found


def test_spectral_gaps_in_closed_form() -> None:
    for n in (4, 9, 16):
        assert gap("ring", n) == pytest.approx(1 - max(abs(1 + 2 * cos(2 * pi * k / n)) for k in range(1, n)) / 3)
    assert gap("torus", 25) == pytest.approx(1 - (3 + 2 * cos(2 * pi / 5)) / 5)
    assert gap("hypercube", 16) == pytest.approx(2 / 5)  # eigenvalues (d + 1 - 2k) / (d + 1)
    assert gap("complete", 7) == pytest.approx(1.0)
    assert gap("exponential", 16) == pytest.approx(2 / 5)  # 2 / (1 + log2 n), arXiv:2110.13363, proposition 1
    star = {"edges": tuple((0, i) for i in range(1, 9)), "mixing": "uniform"}
    assert gap("edges", 9, **star) == pytest.approx(1 / 2)  # a leaf is half itself; means are not kept
    ring = TOPOLOGIES["ring"]().graph(9, 0, 0)
    assert spectral_gap([ring, ring]) == pytest.approx(gap("ring", 9))  # per step
    assert gap("exponential", 16, one_peer=True) == pytest.approx(1.0)  # exact after log2 n steps, lemma 1


def test_one_peer_of_the_exponential_graph_at_a_time() -> None:
    topology = TOPOLOGIES["exponential"](one_peer=True)
    for step, distance in enumerate([1, 2, 4, 1]):
        graph = topology.graph(8, 0, step)
        assert edges_of(graph) == {(i, (i + distance) % 8) for i in range(8)} and set(graph.weights.tolist()) == {0.5}


@pytest.mark.parametrize("name", ["random_regular", "erdos_renyi"])
def test_random_graphs_are_keyed_by_seed_and_step(name: str) -> None:
    fixed, anew = TOPOLOGIES[name](), TOPOLOGIES[name](redraw=2)
    edges = [edges_of(fixed.graph(N, 0, step)) for step in (0, 7)]
    assert edges[0] == edges[1] != edges_of(fixed.graph(N, 1, 0))
    steps = [edges_of(anew.graph(N, 0, step)) for step in range(4)]
    assert steps[0] == steps[1] == edges[0] and steps[2] == steps[3] != steps[0]


def test_regular_means_that_all_have_as_many_neighbours() -> None:
    assert set(TOPOLOGIES["random_regular"](degree=5).graph(N, 3, 0).counts.tolist()) == {6}


def test_weights_and_a_file_may_be_given(tmp_path: Path) -> None:
    file = tmp_path / "links.txt"
    file.write_text("1 2 0.25\n0 1 0.5\n")
    for topology in (TOPOLOGIES["edges"](file=str(file)), TOPOLOGIES["edges"](edges=[[2, 1, 0.25], [0, 1, 0.5]])):
        expected = [[0.5, 0.5, 0.0], [0.5, 0.25, 0.25], [0.0, 0.25, 0.75]]
        assert topology.graph(3, 0, 0).dense(3).tolist() == expected


@pytest.mark.parametrize(
    "name, settings, n, message",
    [
        ("edges", {"edges": ((0, 1), (2, 3))}, 5, r"falls into 3 parts: \{0, 1\}, \{2, 3\}, \{4\}; give it more links"),
        ("edges", {"edges": ((0, 7),)}, 5, r"\[0, 7\] is no link between two of the 5 peers 0\.\.4"),
        ("edges", {"edges": ((0, 0),)}, 5, r"\[0, 0\] is no link"),
        ("edges", {"edges": ((0, 1), (1, 0))}, 2, "a link stands there twice"),
        ("edges", {"edges": ((0, 1, 0.5), (1, 2))}, 3, "all links bring a weight too"),
        ("edges", {"edges": ((0, 1, 0.7), (1, 2, 0.6))}, 3, "those of peer 1 add up to 1.3"),
        ("edges", {"file": "nowhere.txt"}, 3, "can't read nowhere.txt"),
        ("torus", {}, 7, "7 peers make no such grid"),
        ("torus", {"rows": 5}, 12, "rows=5 make no such grid of 12 peers"),
        ("hypercube", {}, 12, "a power of two of peers, got 12"),
        ("random_regular", {}, 5, "degree=3 of 5 peers can't be"),
        ("erdos_renyi", {"p": 0.01}, 9, "it falls into . parts"),
    ],
)
def test_graphs_that_can_not_be_are_refused(name: str, settings: dict[str, Any], n: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TOPOLOGIES[name](**settings).graph(n, 0, 0)


@pytest.mark.parametrize(
    "name, settings",
    [("edges", {}), ("ring", {"mixing": "none"}), ("erdos_renyi", {"p": 0.0}), ("random_regular", {"redraw": 0})],
)
def test_settings_that_mean_nothing_are_refused(name: str, settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        TOPOLOGIES[name](**settings)


def test_a_graph_that_is_drawn_anew_may_fall_apart_for_a_step() -> None:
    topology = TOPOLOGIES["erdos_renyi"](p=0.05, redraw=1)
    assert int(topology.graph(9, 0, 0).counts.min()) == 1
