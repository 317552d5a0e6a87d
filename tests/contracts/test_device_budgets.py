"""How often the host launches work on a device, waits for it and copies to and from it: budgets that do not grow.

Counted on a pretend GPU (`tests.device`). Launches of a local step and waits of a stack depend neither on the number of
clients nor on the number of steps or of the model's tensors, and no step waits. The second round of a run is counted,
when everything that is made once is there.

Letters: C clients of a stack, K local steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedsim.aggregate import AGGREGATORS, PRE_AGGREGATORS
from fedsim.compose import compose
from fedsim.engine import Batch, build_engine
from fedsim.engine.build import ENGINES
from fedsim.optim import build
from fedsim.params import Layout
from fedsim.streams import Streams
from fedsim.tasks.models import MODELS
from tests.build import Play
from tests.contracts.test_aggregators import build as build_rule
from tests.contracts.test_aggregators import rows as drawn_rows
from tests.contracts.test_optimizers import NAMES, section
from tests.device import Counts, pretend_gpu, why_not
from tests.device_streams import pretend_streams
from tests.fedsim.engine import zoo

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

SCHEDULE = {"name": "cosine", "unit": "steps", "length": 99}
KINDS: dict[str, dict[str, Any]] = {
    "SGD": {},
    "momentum": {"rule": {"name": "sgd", "lr": 0.05, "momentum": 0.9}},
    "AdamW": {"rule": {"name": "adamw", "lr": 0.001}},
    "AdamW, scheduled": {"rule": {"name": "adamw", "lr": 0.001, "schedule": SCHEDULE}},
    "SCAFFOLD": {"strategy": {"name": "scaffold"}},
    "SCAFFOLD-M": {"strategy": {"name": "scaffold_m", "beta": 0.5}},
    "FedProx": {"strategy": {"name": "fedprox", "mu": 0.1}},
    "FedDyn": {"strategy": {"name": "feddyn", "alpha": 0.1}},
    "FedNova": {"strategy": {"name": "fednova", "mu": 0.1}},
}
WAITS_OF_A_STACK = 7  # ids, sample counts, weights, losses; a flag of its run; memory read and written


class Spent(NamedTuple):
    launches: int
    waits: int
    bytes_up: int
    bytes_down: int


NOTHING = Spent(0, 0, 0, 0)


def spent(counts: Counts, before: Spent = NOTHING) -> Spent:
    now = (counts.launches, counts.waits, counts.bytes_up, counts.bytes_down)
    return Spent(*(n - b for n, b in zip(now, before, strict=True)))


def second_round(
    clients: int = 2,
    steps: int = 2,
    stack: int | None = None,
    model: str | dict[str, Any] = "cnn",
    strategy: dict[str, Any] | None = None,
    rule: dict[str, Any] | None = None,
    uplink: dict[str, Any] | None = None,
    memory: str = "auto",
    data: str = "auto",
    partition: str | dict[str, Any] = "iid",
    engine: str = "auto",
    rounds: int = 1,
    graphs: bool = False,
) -> Spent:
    """What the second round of a run on digits, or so many, cost; all clients are one stack unless told otherwise."""
    config = {
        "rounds": 1 + rounds,
        "task": {"name": "classification", "dataset": "digits", "model": model},
        "partition": partition,
        "clients": {"count": clients},
        "strategy": strategy or {"name": "fedavg"},
        "local": {"steps": steps, "batch_size": 8, "optimizer": rule or {"name": "sgd", "lr": 0.05}} if steps else {},
        "uplink": uplink or {},
        "runtime": {
            "device": "cuda",
            "workers": 1,
            "stack": stack or clients,
            "memory": memory,
            "engine": engine,
            "graphs": graphs,
            "data": data,
        },
    }
    with pretend_gpu() as counts, pretend_streams():
        composition = compose(config, "config")
        run = composition.experiment
        play = Play(run.strategy, run.fleet, run.strategy.init(run.task.init(0).to("cuda")))
        try:
            play.step()
            before = spent(counts)
            for _ in range(rounds):
                play.step()
        finally:
            composition.close()
        return spent(counts, before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_local_step_costs_the_same_launches_for_any_number_of_clients_and_never_waits(kind: str) -> None:
    short, long, many = (second_round(*size, **KINDS[kind]) for size in ((2, 2), (2, 4), (16, 4)))
    assert short.waits == long.waits == many.waits <= WAITS_OF_A_STACK
    assert short.launches < long.launches == many.launches


@pytest.mark.parametrize("model", ["cnn", "resnet", {"name": "mlp", "dropout": 0.5}], ids=str)
def test_a_replayed_step_costs_a_few_launches_whatever_the_model(model: Any) -> None:
    """Two for the minibatch, two to copy it, one for the rate, the replay, a copy of the loss, and its sum."""
    drop = 3 * (model not in ("cnn", "resnet"))  # who drops: clients and jobs, and the seed of the layer
    four, six = (second_round(3, steps, model=model, graphs=True) for steps in (4, 6))
    assert six.launches - four.launches == 2 * (8 + drop) and six.waits == four.waits <= WAITS_OF_A_STACK


@pytest.mark.filterwarnings("ignore:.*not batched")
def test_a_step_of_torchs_own_optimizers_never_waits() -> None:
    rule = {"name": "torch.optim:AdamW", "lr": 0.001}
    short, long, many = (second_round(*size, rule=rule) for size in ((2, 2), (2, 4), (5, 4)))
    assert short.waits == long.waits == many.waits <= WAITS_OF_A_STACK and short.launches < long.launches


def test_a_private_step_never_waits() -> None:
    rule = {"name": "sgd", "lr": 0.05, "dp": {"clip": 1.0, "noise": 0.5}}
    short, long = (second_round(3, steps, rule=rule) for steps in (2, 4))
    assert short.waits == long.waits <= WAITS_OF_A_STACK and short.launches < long.launches


@pytest.mark.filterwarnings("ignore:Drawing cannot be batched")
def test_a_step_that_draws_from_torchs_generator_never_waits() -> None:
    model = "tests.fedsim.engine.zoo:drawing"
    short, long, two = (second_round(*size, model=model) for size in ((2, 2), (2, 4), (3, 4)))
    assert short.waits == long.waits == two.waits <= WAITS_OF_A_STACK + 2  # and the ids, by which it is seeded
    assert short.launches < long.launches


class Attending(nn.Module):
    """Attention and norms of torch's own, with dropout inside."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.1, batch_first=True)
        self.last = nn.Linear(8, zoo.K)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.block(x.flatten(1).unflatten(1, (8, 8))).mean(1))
        return out


class Recurrent(nn.Module):
    """A recurrent layer over the lines of an image."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer, self.last = layer, nn.Linear(layer.hidden_size, zoo.K)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.layer(x.flatten(1).unflatten(1, (8, 8)))[0][:, -1])
        return out


MODULES: dict[str, Callable[[], nn.Module]] = {name: lambda name=name: zoo.model(name)[0] for name in MODELS}  # type: ignore[misc]
MODULES |= {
    "attention": Attending,
    "GRU": lambda: Recurrent(nn.GRU(8, 6, batch_first=True)),
    "RNN": lambda: Recurrent(nn.RNN(8, 6, batch_first=True)),
}
WHOLE_KERNELS = ("char_lstm", "GRU")  # in the loop engine, of which a pretend GPU has none


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("engine", ENGINES)
def test_no_engine_waits_in_a_step_of_any_model_whose_clients_are_padded(engine: str, name: str) -> None:
    if engine == "loop" and name in WHOLE_KERNELS:
        pytest.skip("a kernel of its own")
    module, counts = MODULES[name]().float(), [4, 2, 0, 1]
    layout, x0 = zoo.numbers_of(module)
    host = zoo.batch(name, counts)
    with pretend_gpu() as spent_on:
        device = torch.device("cuda")
        made = build_engine(engine, module, layout, "cross_entropy", device)
        inputs = host.inputs if name in zoo.SEQUENCES else host.inputs.float()
        ids = torch.arange(len(counts)).to(device)
        batch = Batch(
            inputs.to(device),
            host.targets.to(device),
            host.weights.float().to(device),
            Streams(3, ids, 0 * ids),
            counts=counts,
        )
        session = made.session(x0.float().repeat(len(counts), 1).to(device))
        session.gradient(batch)  # whatever is made once
        before = spent(spent_on)
        session.gradient(batch)
        assert spent(spent_on, before).waits == 0, spent_on.where("waits")


@pytest.mark.parametrize("engine", ENGINES)
def test_uneven_clients_add_no_waits(engine: str) -> None:
    uneven = {"name": "quantity_skew", "alpha": 1.0}
    two, four = (second_round(4, k, model="logistic", partition=uneven, engine=engine) for k in (2, 4))
    assert two.waits == four.waits <= WAITS_OF_A_STACK and two.launches < four.launches


@pytest.mark.parametrize("kind", KINDS)
def test_the_number_of_tensors_of_a_model_adds_no_waits(kind: str) -> None:
    two, eight = (second_round(model=m, **KINDS[kind]) for m in ("logistic", {"name": "mlp", "hidden": [32] * 3}))
    assert two.waits == eight.waits


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_four_stacks_cost_four_times_one(kind: str) -> None:
    one, four = (second_round(clients, stack=4, **KINDS[kind]) for clients in (4, 16))
    assert four.waits == 4 * one.waits and four.launches <= 4 * one.launches + 4


@pytest.mark.parametrize("kind", ["SGD", "momentum", "AdamW"])
@pytest.mark.parametrize("model", ["logistic", "cnn"])
def test_a_round_moves_ids_counts_and_numbers_only(kind: str, model: str) -> None:
    cost = second_round(16, model=model, **KINDS[kind])
    assert cost.bytes_up == 16 * 8 * 6  # id, job; samples, steps, steps of an epoch; weight
    assert cost.bytes_down <= 16 * 4 + 4  # loss; whether all gradients were finite


KEEPERS: dict[str, dict[str, Any]] = {
    "SCAFFOLD": {"strategy": {"name": "scaffold"}},
    "SCAFFOLD-M": {"strategy": {"name": "scaffold_m", "beta": 0.5}},
    "MoNNA": {"strategy": {"name": "monna", "f": 1}},
    "MASHA1": {"strategy": {"name": "masha1", "lr": 0.05, "compressor": {"name": "rand_k", "k": 5}}, "steps": 0},
    "error feedback": {"uplink": {"compressor": {"name": "top_k", "k": 5}, "error_feedback": True}},
    "optimizer state": {"rule": {"name": "adamw", "lr": 0.001, "state_scope": "client"}},
}


@pytest.mark.parametrize("kind", KEEPERS)
def test_rows_that_clients_keep_stay_on_the_device(kind: str) -> None:
    small, large = (
        second_round(8, model=m, **KEEPERS[kind]) for m in ("logistic", {"name": "mlp", "hidden": [32] * 3})
    )
    assert (small.bytes_up, small.bytes_down) == (large.bytes_up, large.bytes_down), "ids, counts and numbers alone"
    assert small.waits == large.waits and small.bytes_down <= 8 * 24, "three numbers of each client"


def test_rounds_cost_the_same_with_any_number_of_jobs_in_flight() -> None:
    strategy = {"name": "fedbuff", "buffer_size": 2}
    few, many = (second_round(n, model="logistic", strategy=strategy, rounds=8) for n in (8, 32))
    assert many.waits <= few.waits <= 8 * (3 + WAITS_OF_A_STACK) and many.launches <= few.launches


def test_rows_that_are_kept_elsewhere_cross_over_once_each_way() -> None:
    here, there = (second_round(8, model="logistic", memory=m, **KEEPERS["SCAFFOLD-M"]) for m in ("device", "ram"))
    rows, slots = 8 * 4 * 650, 8 * 8
    assert there.bytes_down == here.bytes_down + rows and there.bytes_up == here.bytes_up + rows - 2 * slots


@pytest.mark.parametrize("name", NAMES)
def test_an_optimizer_step_costs_the_same_for_any_number_of_clients_and_tensors(name: str) -> None:
    def cost(clients: int, layers: int) -> Spent:
        names = tuple(f"{kind}{i}" for i in range(layers) for kind in "wb")
        layout = Layout(names=names, shapes=((4, 5), (4,)) * layers, roles=("matrix", "vector") * layers)
        optimizer = build(section(name), layout)
        grads = torch.randn(8, clients, layout.size, generator=torch.Generator().manual_seed(0))
        with pretend_gpu() as counts:
            ids = torch.arange(clients).to("cuda")
            x, g, doubt = torch.zeros_like(grads[0]).to("cuda"), grads.to("cuda"), torch.zeros((), device="cuda")
            state, before = optimizer.init(x), NOTHING
            for step in range(8):
                before = spent(counts) if step == 4 else before
                optimizer.step_(x, g[step], state, streams=Streams(0, ids, 0 * ids), doubt=doubt)
            return spent(counts, before)

    few = cost(2, 2)
    assert few.launches == cost(16, 2).launches == cost(2, 8).launches
    assert few.waits <= 2 * (name == "galore")  # its new bases are decompositions, in which torch waits


@pytest.mark.parametrize("name", [*AGGREGATORS, *PRE_AGGREGATORS])
def test_a_robust_rule_costs_the_same_for_any_number_of_rows(name: str) -> None:
    def cost(n: int) -> Spent:
        rule = build_rule(AGGREGATORS if name in AGGREGATORS else PRE_AGGREGATORS, name, 1)
        with pretend_gpu() as counts:
            v = drawn_rows(n, 2000).to("cuda")
            weights = v.new_ones(n)
            before = spent(counts)
            rule(v, weights, *([np.random.default_rng(0)] if name in PRE_AGGREGATORS else []))
            return spent(counts, before)

    few, many = cost(8), cost(40)
    assert few.launches == many.launches and few.waits == many.waits <= 19  # nna checks whom it hears
