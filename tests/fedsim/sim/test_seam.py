"""What client halves are handed and hand back: nobody else's storage, of the right shape, and never written through."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fedsim.aggregate import Mean
from fedsim.cohort import Cohort
from fedsim.compose import compose
from fedsim.fleet import Cost
from fedsim.sim.executor import ClientError
from fedsim.sim.fleet import SimFleet
from fedsim.sim.in_process import InProcess
from fedsim.strategies import STRATEGIES
from tests.build import build_fleet, drawn, local_sgd, train, without_wall_time
from tests.composition import pair
from tests.fedsim.sim.runtime import local_runtime
from tests.fedsim.sim.seam_cases import REFUSED, Breakers, Keepers

X = torch.tensor([1.0, 2.0], dtype=torch.float64)
TASK = drawn(3, 2)
HALVES = Breakers()
KEPT = [name for name in vars(Keepers) if not name.startswith("_") and name not in ("local", "heard")]
on_ray = [
    pytest.mark.ray,
    # Ray leaves log files and child processes to the interpreter's end
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module", params=["in process", pytest.param("ray", marks=on_ray)])
def place(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where client halves run."""
    if request.param == "ray":
        with local_runtime(num_cpus=1):
            yield "ray"
    else:
        yield "in process"


def _fleet(place: str, strategy: Any, width: int) -> SimFleet:
    if place == "in process":
        return build_fleet(TASK, strategy, width=width)
    from fedsim.sim.ray_executor import RayExecutor

    return build_fleet(TASK, strategy, width=width, executor=RayExecutor)


def _expected(half: str, keepers: Keepers) -> Tensor:
    """[3, P]: what each client gives where it is the only one, in a process of its own."""
    if half == "model":
        return X.expand(3, -1)
    if half != "trained":
        return X * torch.tensor([[1.0], [2.0], [3.0]])
    a, b = TASK.a, TASK.b
    return (1 - (1 - 0.1 * a) ** 10) * (X - b)


# Nothing is somebody else's storage --------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 3, 64])
def test_what_a_half_replies_and_keeps_is_each_clients_own(place: str, width: int) -> None:
    keepers = Keepers(local=local_sgd(TASK))
    fleet = _fleet(place, keepers, width)
    for half in KEPT:
        work = getattr(keepers, half)
        expected = _expected(half, keepers)
        folded = fleet.ask(fleet.clients, work, fold=Mean(), x=X)["v"]
        torch.testing.assert_close(folded, expected.mean(0), msg=half)
        torch.testing.assert_close(fleet.memory.of(fleet.clients)["last"], expected, msg=half)
        nothing = {"last": torch.zeros_like(expected)}
        fleet.memory.write(fleet.clients, nothing)  # for the same again, unfolded
        r = fleet.ask(fleet.clients, work, x=X)
        torch.testing.assert_close(r["v"], expected, msg=half)
        torch.testing.assert_close(fleet.memory.of(fleet.clients)["last"], expected, msg=half)
        for value in r.fields.values():
            value.zero_()  # a server half may do with replies what it likes
        torch.testing.assert_close(fleet.memory.of(fleet.clients)["last"], expected, msg=half)
        fleet.memory.write(fleet.clients, nothing)
    assert X.tolist() == [1.0, 2.0]
    fleet.executor.close()


def test_what_a_half_keeps_of_its_inbox_is_its_own(place: str) -> None:
    keepers = Keepers()
    fleet = _fleet(place, keepers, 3)
    half = fleet.ask(fleet.clients, keepers.twice, cost=Cost(vectors_up=0), x=X)
    heard = fleet.exchange(half, keepers.heard)["v"]
    half["v"].zero_()
    assert heard.tolist() == [[1, 2], [2, 4], [3, 6]] == fleet.memory.of(fleet.clients)["last"].tolist()
    fleet.executor.close()


def test_asynchronous_replies_are_each_clients_own() -> None:
    keepers = Keepers(local=local_sgd(TASK))
    fleet = build_fleet(TASK, keepers, width=1)
    fleet.send(fleet.clients, keepers.trained, x=X)
    expected = _expected("trained", keepers)
    for client in range(3):
        torch.testing.assert_close(fleet.receive(count=1)["v"][0], expected[client])
    torch.testing.assert_close(fleet.memory.of(fleet.clients)["last"], expected)


class Spoiler:
    """A strategy's halves; when the next one is called, all that the one before it was handed is NaN."""

    def __init__(self, strategy: Any) -> None:
        self.strategy = strategy
        self.handed: list[Tensor] = []

    def __getattr__(self, work: str) -> Any:
        half = getattr(self.strategy, work)

        def call(clients: Cohort, *inbox: Any, **broadcast: Any) -> Any:
            for tensor in self.handed:
                tensor.fill_(torch.nan)
            reply = half(clients, *inbox, **broadcast)
            values = [*broadcast.values(), *clients.memory.handed_out(), *clients.pool.values()]
            self.handed = [v for v in values if isinstance(v, Tensor) and v.is_floating_point()]
            return reply

        return call


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_strategy_of_the_table_lets_go_of_what_is_used_again(strategy: str) -> None:
    rows = []
    for spoilt in (False, True):
        composition = compose(pair(strategy, None) | {"runtime": {"stack": 3, "workers": 1}}, "pair")
        if spoilt:
            assert isinstance(composition.executor, InProcess)
            runner = composition.executor.runner
            runner.strategy = Spoiler(runner.strategy)
        _, seen, _ = train(composition.experiment)
        composition.close()
        rows.append(without_wall_time(seen))
    assert rows[0] == rows[1] and len(rows[0]) == 3


# What is handed out and handed back is checked ---------------------------------------------------------------------


@pytest.mark.parametrize("fold", [None, Mean()])
@pytest.mark.parametrize("half", REFUSED)
def test_a_half_that_breaks_the_rules_is_named_with_what_it_should_do(half: str, fold: Mean | None) -> None:
    fleet = build_fleet(TASK, HALVES)
    x = X.clone()
    with pytest.raises(ClientError, match=rf"^Breakers\.{half} failed in round 1 for client\(s\) 0, 1, 2: .*") as found:
        fleet.ask(fleet.clients, getattr(HALVES, half), fold=fold, x=x)
    assert found.match(REFUSED[half]) and x.tolist() == X.tolist()


def test_stacks_reply_the_same_fields_of_one_shape(place: str) -> None:
    fleet = _fleet(place, HALVES, 1)
    for half, said in (
        ("uneven", r"delta \[2\] and another delta \[1\]"),
        ("unnamed", r"delta \[2\] and .* gamma \[2\]"),
    ):
        for fold in (None, Mean()):
            with pytest.raises(ClientError, match=rf"^Breakers\.{half}: one stack replied {said}"):
                fleet.ask(fleet.clients, getattr(HALVES, half), fold=fold, x=X)
    fleet.executor.close()


def test_memory_keeps_rows_of_one_shape() -> None:
    fleet = build_fleet(TASK, HALVES)
    fleet.memory.write(fleet.clients, {"c": torch.zeros(3, 2)})
    with pytest.raises(
        ValueError, match=r"memory\['c'\] holds rows of shape \[2\], and one of shape \[4\] was written"
    ):
        fleet.memory.write(fleet.clients, {"c": torch.zeros(3, 4)})


@pytest.mark.parametrize("workers", [1, 2])
def test_stacks_side_by_side_are_not_blamed_for_each_other(workers: int) -> None:
    class Some(Breakers):
        def writes_model(self, clients: Cohort, x: Tensor) -> dict[str, Any]:
            return super().writes_model(clients, x) if 1 in clients.ids.tolist() else {"delta": x.expand(1, -1)}

    some = Some()
    fleet = build_fleet(TASK, some, width=1, workers=workers)
    with pytest.raises(ClientError, match=r"for client\(s\) 1: ValueError: it wrote"):
        fleet.ask(fleet.clients, some.writes_model, x=X)


def test_writing_to_a_large_model_is_refused_wherever_it_lies(place: str) -> None:
    x = torch.ones(1 << 18, dtype=torch.float64)  # large enough for Ray to share it read-only
    fleet = _fleet(place, HALVES, 3)
    with pytest.raises(ClientError, match="wrote to the x that it received"):
        fleet.ask(fleet.clients, HALVES.writes_model, x=x)
    fleet.ask(fleet.clients, HALVES.writes_numpy, x=x)
    assert float(x.min()) == float(x.max()) == 1.0
    fleet.executor.close()


def test_writing_to_an_inbox_is_refused(place: str) -> None:
    fleet = _fleet(place, HALVES, 3)
    half = fleet.ask(fleet.clients, HALVES.half, cost=Cost(vectors_up=0), x=X.repeat(1 << 17))
    with pytest.raises(ClientError, match=r"wrote to the inbox\['v'\] that it received, in place"):
        fleet.exchange(half, HALVES.writes_inbox)
    fleet.executor.close()
