"""FedAvg with one step over a compressed uplink is compressed gradient descent, with or without error feedback."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fedsim.compress.sparsify import RandK, TopK
from fedsim.sim.links import Uplink
from fedsim.strategies.fedavg import FedAvg
from fedsim.streams import Streams
from fedsim.tasks.quadratic import QuadraticTask
from tests.build import drawn, local_sgd, play
from tests.reference.clients import Formulas
from tests.reference.compressed import compressed_descent
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
