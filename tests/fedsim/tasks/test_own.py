"""A task of the user's own by import path: the same runs as a task of ours, and one sentence for each mistake."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fedsim
from fedsim.compose import compose
from fedsim.config import ConfigError
from fedsim.params import Layout
from fedsim.strategies import STRATEGIES
from fedsim.streams import Streams
from fedsim.task import Pool, Schedule, Task
from fedsim.tasks.batches import BatchPlan, Samples
from tests.build import without_wall_time
from tests.composition import pair

A, B = [1.0, 3.0, 2.0, 0.5], [0.0, 1.0, -1.0, 4.0]


class Springs(Task):
    """f_i(x) = a_i / 2 (x - b_i)^2, by the four methods alone."""

    def __init__(self) -> None:
        self.a, self.b = torch.tensor(A), torch.tensor(B)
        self.layout, self.num_examples = Layout.of({"x": (1,)}), torch.ones(4, dtype=torch.int64)

    def init(self, seed: int) -> Tensor:
        return torch.zeros(1)

    def batches(self, ids: Tensor, streams: Streams, schedule: Schedule) -> BatchPlan:
        return BatchPlan(self.num_examples[ids], schedule, streams, locate=lambda position: ids[:, None] + position)

    def field(self, x: Tensor, batch: Samples) -> tuple[Tensor, Tensor]:
        away = x - self.b[batch.rows]
        g = self.a[batch.rows] * away
        return g, 0.5 * (g * away)[:, 0]

    def evaluate(self, x: Tensor, pool: Pool) -> dict[str, float]:
        solution = (self.a * self.b).double().sum() / self.a.double().sum()
        return {"distance": float((x.double() - solution).abs())}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_runs_on_it_as_on_a_task_of_ours(strategy: str) -> None:
    raw = pair(strategy, "quadratic task") | {"clients": {"count": 4}, "evaluate": {"every": 1, "per_client": False}}
    runs = [
        fedsim.run(raw | {"task": task}).rows
        for task in ({"name": f"{__name__}:Springs"}, {"name": "quadratic", "a": A, "b": B})
    ]
    ours = [{k: v for k, v in row.items() if k != "test_loss"} for row in without_wall_time(runs[1])]
    assert without_wall_time(runs[0]) == ours
    assert "distance" in ours[-1]


class Unfinished(Springs):
    evaluate = Task.evaluate  # type: ignore[assignment]
    field = Task.field  # type: ignore[assignment]


class Bare(Springs):
    def __init__(self) -> None:
        """Forgets its layout."""
        self.num_examples = torch.ones(4, dtype=torch.int64)


class NoData(Springs):
    def __init__(self) -> None:
        super().__init__()
        self.num_examples = torch.zeros(4, dtype=torch.int64)


class Wide(Springs):
    def init(self, seed: int) -> Tensor:
        return torch.zeros(2)


class Summed(Springs):
    def field(self, x: Tensor, batch: Samples) -> tuple[Tensor, Tensor]:
        g, loss = super().field(x, batch)
        return g, loss.sum()


class Failing(Springs):
    def field(self, x: Tensor, batch: Samples) -> tuple[Tensor, Tensor]:
        raise KeyError("spring")


def number() -> int:
    return 7


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("number", r"task: gave a int, not a fedsim\.Task; docs/tutorial/tasks\.md shows"),
        ("Unfinished", r"task\.name: lacks evaluate, field; docs/tutorial/tasks\.md shows"),
        ("Bare", r"task: Bare: AttributeError: .*no attribute 'layout'"),
        ("NoData", r"task: NoData: num_examples must be \[N\] int64, above 0 for some client"),
        ("Wide", r"task: Wide: init must give floating-point numbers \[1\], not torch\.float32\[2\]"),
        ("Summed", r"task: Summed: field's loss must give floating-point numbers \[1\], not torch\.float32\[\]"),
        ("Failing", r"task: Failing: KeyError: 'spring' \(test_own\.py, line \d+\)"),
    ],
)
def test_what_is_no_task_is_refused_with_what_is_missing(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose({"task": f"{__name__}:{name}"}, "x.yaml")


def test_it_has_as_many_clients_as_it_says() -> None:
    with pytest.raises(ConfigError, match="task: it has 4 clients, but clients.count is 5; give"):
        compose({"task": f"{__name__}:Springs", "clients": {"count": 5}}, "x.yaml")


def test_it_cannot_do_what_it_does_not_say() -> None:
    raw: dict[str, Any] = {"task": f"{__name__}:Springs"}
    with pytest.raises(ConfigError, match="needs hvp, but this task gives a gradient alone"):
        compose(raw | {"local": {"optimizer": "sophia_h"}}, "x.yaml")
    with pytest.raises(ConfigError, match="attack: poisons labels, which this task does not have"):
        compose(raw | {"clients": {"byzantine": {"attack": "label_flip", "count": 1}}}, "x.yaml")
