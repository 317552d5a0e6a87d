"""FedAvg with one step over a compressed uplink is compressed gradient descent, with or without error feedback."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fedsim.compress.low_rank import PowerSGD
from fedsim.compress.seeds import Seeds
from fedsim.compress.sparsify import RandK, TopK
from fedsim.params import Layout
from fedsim.sim.links import Uplink, step_of
from fedsim.strategies.fedavg import FedAvg
from fedsim.streams import Streams
from fedsim.tasks.quadratic import QuadraticTask
from tests.build import Play, drawn, local_sgd, play
from tests.reference.clients import Formulas
from tests.reference.compressed import compressed_descent, power_sgd
from tests.reference.saddle import top


def _twin(task: QuadraticTask) -> Formulas:
    return Formulas(task.a, task.b, 1)


def _rand(v: Tensor, client: int, job: int) -> Tensor:
    streams = Streams(0, torch.tensor([client]), torch.tensor([job]))
    step = sum((i + 1) * ord(c) for i, c in enumerate("delta"))
    return RandK(k=2).encode(v[None], streams, step).decode()[0]


@pytest.mark.parametrize(
    "compressor, compress, feedback",
    [(RandK(k=2), _rand, False), (TopK(k=2), top(2), False), (TopK(k=2), top(2), True)],
    ids=["dcgd", "top-k", "ef14"],
)
def test_equals_its_twin(compressor: Any, compress: Any, feedback: bool) -> None:
    task = drawn(4, 10)
    uplink = Uplink(compressor=compressor, error_feedback=feedback)
    got = play(task, FedAvg(local=local_sgd(task, 0.1, steps=1)), 40, uplink=uplink, width=3)
    expected = compressed_descent(_twin(task), task.x0, 40, eta=0.1, compress=compress, feedback=feedback)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(4, 3), (2, 6)], ids=["tall", "wide"])
@pytest.mark.parametrize("feedback", [False, True])
def test_powersgd_begins_where_the_clients_last_message_ended(shape: tuple[int, int], feedback: bool) -> None:
    def first(client: int, job: int) -> Tensor:
        streams = Streams(0, torch.tensor([client]), torch.tensor([job]))
        return streams.normal("compress.powersgd.w", min(shape), 1, step=step_of("delta"), dtype=torch.float64)[0]

    task, rule = drawn(4, 12), PowerSGD(rank=1, layout=Layout.of({"w": shape}))
    uplink = Uplink(compressor=rule, error_feedback=feedback)
    got = play(task, FedAvg(local=local_sgd(task, 0.1, steps=1)), 30, uplink=uplink, width=3)
    compress = power_sgd(*shape, rank=1, first=first)
    expected = compressed_descent(_twin(task), task.x0, 30, eta=0.1, compress=compress, feedback=feedback)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)


def _stalls_at(eta: float, uplink: Uplink, rounds: int) -> float:
    """Root mean square distance to the solution over the last rounds, from a start at the solution."""
    task = drawn(4, 10)
    task.x0 = task.solution()
    path = play(task, FedAvg(local=local_sgd(task, eta, steps=1)), rounds, uplink=uplink)[-100:]
    return float((path - task.solution()).square().sum(1).mean().sqrt())


def test_error_feedback_leaves_a_neighbourhood_that_shrinks_with_the_step() -> None:
    feedback = Uplink(compressor=TopK(k=2), error_feedback=True)
    large, small = _stalls_at(0.1, feedback, 200), _stalls_at(0.01, feedback, 500)
    assert small < 0.2 * large and large < 0.6


def test_unbiased_compression_alone_hovers_where_gradients_do_not_vanish() -> None:
    assert _stalls_at(0.1, Uplink(compressor=RandK(k=2)), 250) > 0.3


def test_top_k_alone_goes_elsewhere_however_small_the_step() -> None:
    plain = Uplink(compressor=TopK(k=2))
    assert min(_stalls_at(0.1, plain, 250), _stalls_at(0.02, plain, 500)) > 0.3


def _replayed(task: QuadraticTask, rounds: int, lr: float, steps: int, directions: int, eps: float) -> Tensor:
    """[rounds, P] of MeZO on every client, by the book: what travels is a list of (step, direction, number)."""
    x, path = task.x0, []
    weight = task.num_examples.double() / task.num_examples.sum()
    for job in range(rounds):
        model = x
        for client in range(len(weight)):
            streams = Streams(0, torch.tensor([client]), torch.tensor([job]))

            def loss(at: Tensor, client: int = client) -> Tensor:
                return task.evaluate_clients(at, None)["loss"][client]

            y, message = x, []
            for step in range(1, steps + 1):
                here = y
                for i in range(directions):
                    z = streams.normal(f"optimizer direction {i}", len(x), step=step, dtype=x.dtype)[0]
                    slope = float(loss(here + eps * z) - loss(here - eps * z)) / (2 * eps)
                    message.append((step, i, slope))
                    y = y - lr / directions * slope * z
            for step, i, number in message:  # at the server
                z = streams.normal(f"optimizer direction {i}", len(x), step=step, dtype=x.dtype)[0]
                model = model - weight[client] * lr / directions * number * z
        x = model
        path.append(x)
    return torch.stack(path)


@pytest.mark.parametrize("directions", [1, 2])
def test_a_run_of_mezo_travels_as_one_number_for_every_direction(directions: int) -> None:
    task = drawn(4, 20)
    mezo = {"name": "mezo", "lr": 0.01, "zeroth_order": {"eps": 1e-3, "directions": directions}}
    strategy = FedAvg(local=local_sgd(task, optimizer=mezo, steps=5))
    seeds = Uplink(compressor=Seeds(steps=5, directions=directions))
    sent, dense = (Play.start(task, strategy, uplink=uplink, width=3) for uplink in (seeds, None))
    path = sent.path(3)
    torch.testing.assert_close(path, dense.path(3), rtol=0, atol=1e-10)
    torch.testing.assert_close(path, _replayed(task, 3, 0.01, 5, directions, 1e-3), rtol=0, atol=1e-9)
    assert sent.fleet.ledger.bits_up == 3 * 4 * 32 * 5 * directions
    assert dense.fleet.ledger.bits_up == 3 * 4 * 32 * 20
