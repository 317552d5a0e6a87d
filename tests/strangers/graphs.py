"""Graphs with as many edges as they like: messages are scattered along a list of edges that is padded to one length."""

import numpy as np
import torch
from torch import Tensor, nn

import fedsim
from fedsim.data import Dataset, from_arrays

NODES, EDGES = 8, 16


def graphs(seed: int = 0) -> Dataset:
    """Do most edges of a graph join nodes of one colour?"""
    rng = np.random.default_rng(seed)
    n = 400
    colour = rng.integers(2, size=(n, NODES))
    edges, real = rng.integers(NODES, size=(n, 2, EDGES)), np.arange(EDGES) < rng.integers(8, EDGES + 1, size=(n, 1))
    same = np.take_along_axis(colour, edges[:, 0], 1) == np.take_along_axis(colour, edges[:, 1], 1)
    share = (same & real).sum(1) / real.sum(1)
    inputs = {"nodes": np.eye(2, dtype=np.float32)[colour], "edges": edges, "real": real.astype(np.float32)}
    answer = (share > 0.5).astype(int)
    train, test = ({k: v[rows] for k, v in inputs.items()} for rows in (slice(320), slice(320, None)))
    return from_arrays(train, answer[:320], test, answer[320:])


class Messages(nn.Module):
    """Every node hears the sum of what its neighbours say."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.say, self.keep = nn.Linear(2 * width_in, width), nn.Linear(width_in, width)

    def forward(self, h: Tensor, edges: Tensor, real: Tensor) -> Tensor:
        source, target = (e[..., None].expand(*e.shape, h.shape[-1]) for e in edges.unbind(1))
        said = self.say(torch.cat([h.gather(1, source), h.gather(1, target)], -1)).relu() * real[..., None]
        heard = torch.zeros(*h.shape[:2], said.shape[-1]).scatter_add(1, target[..., :1].expand_as(said), said)
        return (self.keep(h) + heard).relu()


class GraphNet(nn.Module):
    def __init__(self, num_classes: int, width: int = 16) -> None:
        super().__init__()
        self.first, self.second = Messages(2, width), Messages(width, width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, nodes: Tensor, edges: Tensor, real: Tensor) -> Tensor:
        h = self.second(self.first(nodes, edges, real), edges, real)
        return self.head(h.mean(1))


def main() -> fedsim.History:
    return fedsim.run(
        {
            "rounds": 10,
            "partition": {"name": "dirichlet", "alpha": 1.0},
            "clients": {"count": 8},
            "local": {"epochs": 3, "batch_size": 10, "optimizer": {"name": "adam", "lr": 0.02}},
            "evaluate": {"every": 10},
        },
        model=GraphNet,
        data=graphs,
        strategy="fedavg",
    )
