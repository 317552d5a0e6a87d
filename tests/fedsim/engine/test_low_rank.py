"""Local runs in factors equal the same steps taken one by one, and are used where they cost less."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fedsim.engine import Batch, build_engine
from fedsim.engine.low_rank import chain_of, low_rank_run
from fedsim.params import Layout
from fedsim.runs import run
from fedsim.streams import Streams
from fedsim.task import Schedule, Walk
from fedsim.tasks import supervised
from fedsim.tasks.batches import BatchPlan
from fedsim.tasks.models import MODELS, init_parameters

LR = 0.3


def _plan(counts: list[int], inputs: Tensor, targets: Tensor, batch_size: int, epochs: int) -> BatchPlan:
    ids = torch.arange(len(counts))
    starts = torch.tensor([0, *torch.tensor(counts).cumsum(0)[:-1].tolist()])

    def gather(step: int | None, k: int, columns: slice, weights: Tensor | None) -> Batch:
        rows = plan.rows[:k, columns]
        return Batch(inputs[rows], targets[rows], None if weights is None else weights.to(inputs))

    plan = BatchPlan(
        torch.tensor(counts),
        Schedule(epochs=epochs, batch_size=batch_size),
        Streams(0, ids, torch.zeros_like(ids)),
        gather,
        lambda positions: (starts[:, None] + positions).clamp(max=len(inputs) - 1),
    )
    return plan


@pytest.mark.parametrize("own_models", [False, True])
@pytest.mark.parametrize("pull", [0.0, 0.8])
@pytest.mark.parametrize("direction", ["gradient", "shared", "own", "both"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("hidden", [[], [7], [9, 5]])
def test_factors_equal_steps_taken_one_by_one(
    hidden: list[int], bias: bool, direction: str, pull: float, own_models: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    widths = [12, *hidden, 4]
    layers: list[nn.Module] = [nn.Flatten()]
    for i, (a, b) in enumerate(zip(widths, widths[1:], strict=False)):
        layers += [nn.ReLU()] * (i > 0) + [nn.Linear(a, b, bias=bias)]
    module = nn.Sequential(*layers).double()
    layout = Layout.of_module(module)
    x = torch.cat([p.detach().flatten() for p in module.parameters()])
    counts = [9, 8, 5, 2, 0]
    inputs = torch.randn(sum(counts), 3, 4, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, 4, (sum(counts),), generator=generator)
    plan = _plan(counts, inputs, targets, batch_size=3, epochs=2)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, layout.size, generator=generator, dtype=torch.float64)

    if own_models:
        x = x + 0.1 * drawn(len(counts))
    scale = 1.0 if direction == "gradient" else 0.4
    terms = [(0.3, drawn()), (-0.7, drawn())] if direction in ("shared", "both") else []
    terms += [(0.5, drawn(len(counts))), (-0.2, drawn(len(counts)))] if direction in ("own", "both") else []
    shift = sum((weight * term for weight, term in terms), torch.zeros(len(counts), layout.size, dtype=torch.float64))

    engine = build_engine("loop", module, layout)
    y, losses = x.expand(len(counts), -1).clone(), torch.zeros(len(counts), dtype=torch.float64)
    total = torch.zeros_like(y)
    for step in range(len(plan)):
        k = plan.active(step)
        g, loss = engine.session(y[:k]).gradient(plan[step])
        total[:k] = (1 - LR * pull) * total[:k] + g
        y[:k] -= LR * (scale * g + pull * (y[:k] - (x[:k] if own_models else x)) + shift[:k])
        losses[:k] += loss

    chain = chain_of(module)
    assert chain is not None
    sums, loss_sums = low_rank_run(chain, layout, x, *plan.whole(), Walk(LR, scale, pull, tuple(terms)))
    torch.testing.assert_close(sums.dense(), total, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(loss_sums, losses, rtol=1e-12, atol=1e-13)
    weights = torch.rand(len(counts), generator=generator, dtype=torch.float64)
    torch.testing.assert_close(sums.weighted_sum(weights), weights @ total, rtol=1e-11, atol=1e-13)
    each = torch.tensor([1.0, 0.5, 0.25, 2.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(sums.dense(each * 3.0), 3 * each[:, None] * total, rtol=1e-11, atol=1e-13)


def test_only_chains_of_linear_layers_are_taken() -> None:
    assert chain_of(init_parameters(lambda: MODELS["mlp"]((1, 8, 8), 10), 0)[0]) is not None
    assert chain_of(init_parameters(lambda: MODELS["logistic"]((1, 8, 8), 10), 0)[0]) is not None
    for module in (
        init_parameters(lambda: MODELS["cnn"]((1, 8, 8), 10), 0)[0],
        init_parameters(lambda: MODELS["mlp"]((1, 8, 8), 10, dropout=0.5), 0)[0],
        nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)),
        nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)),
        nn.Linear(3, 2),
    ):
        assert chain_of(module) is None


STRATEGIES = {
    "fedavg": {"cohort_size": 12},
    "scaffold": {"cohort_size": 12},
    "scaffold_m": {"cohort_size": 12, "beta": 0.3},
    "fedprox": {"cohort_size": 12, "mu": 1.0},
    "feddyn": {"cohort_size": 12, "alpha": 1.0},
    "fedfix": {"interval": 0.5},
    "fedbuff_stream": {"buffer_size": 4, "concurrency": 12},
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_run_in_factors_equals_one_in_steps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {
        "rounds": 4,
        "task": {"name": "classification", "dataset": "digits", "model": {"name": "mlp", "hidden": [200]}},
        "partition": {"name": "dirichlet", "alpha": 20.0},
        "clients": {"count": 80, "devices": {"name": "lognormal", "median": 0.1, "sigma": 0.5}},
        "strategy": {"name": name, **STRATEGIES[name]},
        "local": {"epochs": 1, "batch_size": 8, "optimizer": {"name": "sgd", "lr": 0.1}},
        "evaluate": {"every": 1},
    }
    taken = []
    monkeypatch.setattr(supervised, "low_rank_run", lambda *given: taken.append(1) or low_rank_run(*given))
    factors = run(config)
    assert taken, "some stacks are taken in factors"
    taken.clear()
    steps = run(config, **{"runtime.engine": "loop"})
    assert not taken
    for a, b in zip(factors.rows, steps.rows, strict=True):
        for key in ("train_loss", "test_loss", "test_accuracy"):
            assert a[key] == pytest.approx(b[key], rel=1e-4)
        assert (a["bits_up"], a["bits_down"]) == (b["bits_up"], b["bits_down"])


def test_long_local_runs_are_taken_in_steps() -> None:
    chain = chain_of(init_parameters(lambda: MODELS["mlp"]((1, 28, 28), 10), 0)[0])
    assert chain is not None
    assert chain.worthwhile(60) and not chain.worthwhile(6000)
