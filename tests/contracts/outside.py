"""One of every kind, as a user would write it outside of fedsim. Each notes in `USED` that it did its work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

import fedsim
from fedsim.aggregate import Mean
from fedsim.clients.local_training import LocalTraining, Reply
from fedsim.compress.packet import Compressor, Field, Packet
from fedsim.data import Dataset
from fedsim.data.arrays import from_arrays
from fedsim.engine.loop import LoopEngine
from fedsim.optim import Rule
from fedsim.params import Layout
from fedsim.sim.byzantine import Knowledge
from fedsim.strategies.selection import Among, Known, Selection
from fedsim.streams import Streams
from fedsim.task import Pool, Schedule, Session
from fedsim.tasks.batches import BatchPlan, Samples
from fedsim.topology.base import Linked, both_ways

USED: set[str] = set()  # parts that were called, not only made


@dataclass(frozen=True)
class State:
    x: Tensor


@dataclass(frozen=True, kw_only=True)
class Halved(fedsim.Strategy):
    """FedAvg of all clients with half a step."""

    local: LocalTraining

    def init(self, x0: Tensor) -> State:
        return State(x0)

    def round(self, s: State, fleet: fedsim.Fleet, rng: np.random.Generator) -> tuple[State, dict[str, Any]]:
        USED.add("Halved")
        r = fleet.ask(fleet.clients, self.train, cost=self.local.cost, fold=Mean(), x=s.x)
        return State(s.x - 0.5 * r["delta"]), {}

    def train(self, clients: fedsim.Cohort, x: Tensor) -> Reply:
        return {"delta": self.local(clients, x).delta}


@dataclass(frozen=True, kw_only=True)
class Signs(Rule):
    """Steps of one length along the signs of a slow mean of gradients."""

    rho: float = 0.9
    states: ClassVar = (fedsim.optim.rule.State("m"),)
    default_lr: ClassVar = 0.01

    def coefficients(self, t: Any, lr: Any, host: Any) -> Mapping[str, Any]:
        return {"fresh": 1 - self.rho}

    def direction(self, x: Tensor, g: Tensor, s: Any, c: Any, seg: Any) -> Tensor:
        USED.add("Signs")
        s.m.lerp_(g, c.fresh)
        return s.m.sign()


@dataclass(frozen=True, kw_only=True)
class FirstHalf(Compressor):
    """Sends the first half of a vector."""

    unbiased: ClassVar = False

    def fields(self, num_entries: int) -> tuple[Field, ...]:
        return (Field("head", num_entries // 2),)

    def encode(self, v: Tensor, streams: Streams, step: int = 0) -> Packet:
        return Packet(compressor=self, num_entries=v.shape[1], payload={"head": v[:, : v.shape[1] // 2].clone()})

    def decode(self, payload: Mapping[str, Tensor], num_entries: int) -> Tensor:
        USED.add("FirstHalf")
        head = payload["head"]
        return torch.cat([head, head.new_zeros(len(head), num_entries - head.shape[1])], dim=1)


@dataclass(frozen=True, kw_only=True)
class Midrange:
    """Halfway between the least and the largest of each entry."""

    foldable: ClassVar = False

    def __call__(self, v: Tensor, weights: Tensor) -> Tensor:
        USED.add("Midrange")
        return (v.amin(0) + v.amax(0)) / 2


@dataclass(frozen=True, kw_only=True)
class FirstOnes(Selection):
    """Those with the lowest numbers."""

    def choose(self, known: Known, among: Among, rng: np.random.Generator) -> tuple[Tensor, Known]:
        USED.add("FirstOnes")
        return among.clients[: among.count], known


@dataclass(frozen=True, kw_only=True)
class WithoutTheLongest:
    """Leaves out the row of the largest norm."""

    def __call__(self, v: Tensor, weights: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        USED.add("WithoutTheLongest")
        keep = torch.arange(len(v)) != int(v.norm(dim=1).argmax())
        return v[keep], weights[keep]


@dataclass(frozen=True, kw_only=True)
class Nothing:
    """Sends zeros."""

    on_data: ClassVar = False

    def __call__(self, honest: Tensor, b: int, streams: Streams, known: Knowledge) -> Tensor:
        USED.add("Nothing")
        return honest.new_zeros(b, honest.shape[1])


@dataclass(frozen=True, kw_only=True)
class Whispers(Nothing):
    """Tells every peer its own vector back."""

    def to_each(self, own: Tensor, mean: Tensor, weight: Tensor, streams: Streams, known: Knowledge) -> Tensor:
        USED.add("Whispers")
        return own


@dataclass(frozen=True, kw_only=True)
class Star(Linked):
    """One peer hears all others, and they hear it."""

    centre: int = 0

    def pairs(self, n: int, seed: int, turn: int) -> Tensor:
        USED.add("Star")
        others = torch.tensor([i for i in range(n) if i != self.centre])
        return both_ways(torch.stack([torch.full_like(others, self.centre), others]))


@dataclass(frozen=True, kw_only=True)
class InTurn:
    """Rows dealt out in turn."""

    def __call__(self, data: Dataset, num_clients: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        USED.add("InTurn")
        owners = np.arange(len(data.targets)) % num_clients
        sizes = np.bincount(owners, minlength=num_clients)
        return np.argsort(owners, kind="stable"), np.concatenate([[0], sizes.cumsum()])


@dataclass(frozen=True, kw_only=True)
class OddAreSlow:
    """Clients with odd numbers take twice as long."""

    random: ClassVar = False

    def seconds(self, streams: Streams, steps: Tensor, bits_down: Tensor, bits_up: Tensor) -> Tensor:
        USED.add("OddAreSlow")
        return steps.double() * (1 + streams.clients.cpu() % 2)


def two_moons(num_examples: int = 200) -> Dataset:
    """Two half circles."""
    USED.add("two_moons")
    angle = torch.linspace(0, torch.pi, num_examples // 2)
    up, down = torch.stack([angle.cos(), angle.sin()], 1), torch.stack([1 - angle.cos(), 0.5 - angle.sin()], 1)
    targets = torch.arange(2).repeat_interleave(len(angle))
    return from_arrays(torch.cat([up, down]), targets)


class Perceptron(nn.Module):
    """One hidden layer of tanh."""

    def __init__(self, input_shape: tuple[int, ...], num_classes: int, width: int = 8) -> None:
        super().__init__()
        self.hidden = nn.Linear(input_shape[0], width)
        self.out = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        USED.add("Perceptron")
        return self.out(torch.tanh(self.hidden(x)))


def squared_error(logits: Tensor, targets: Tensor) -> Tensor:
    """Distance of the logits from the target's one-hot code, squared."""
    USED.add("squared_error")
    return (logits - nn.functional.one_hot(targets, logits.shape[-1])).square().sum(-1)


class Friction(torch.optim.SGD):
    """SGD of torch by another name."""

    def step(self, closure: Any = None) -> Any:
        USED.add("Friction")
        return super().step(closure)


class OneByOne(LoopEngine):
    """The loop engine by another name."""

    name = "tests.contracts.outside:OneByOne"

    def session(self, x: Tensor) -> Session:
        USED.add("OneByOne")
        return super().session(x)


class Slope(fedsim.Task):
    """Each client knows points of one line through the origin; the slope is sought."""

    def __init__(self, count: int, slope: float = 2.0) -> None:
        self.layout = Layout.of({"slope": (1,)})
        self.num_examples = torch.arange(1, count + 1)
        self.slope = slope

    def init(self, seed: int) -> Tensor:
        return torch.zeros(1)

    def batches(self, ids: Tensor, streams: Streams, schedule: Schedule) -> BatchPlan:
        return BatchPlan(self.num_examples[ids], schedule, streams)

    def field(self, x: Tensor, batch: Samples) -> tuple[Tensor, Tensor]:
        USED.add("Slope")
        at = 1.0 + batch.rows
        away = at * (x - self.slope)
        return (batch.shares * at * away).sum(1, keepdim=True), (batch.shares * away**2).sum(1) / 2

    def evaluate(self, x: Tensor, pool: Pool) -> dict[str, float]:
        return {"distance": abs(float(x) - self.slope)}
