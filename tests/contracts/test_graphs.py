"""Steps that are replayed as CUDA graphs give what steps give, and cost a few launches whatever the model.

On the machine's own GPU where it has one (`make gpu`), else on a pretend one, whose replays do again what was captured,
on the same memory. There bits are equal; a GPU may add up in another order.

Letters: C clients of a stack, k of them still stepping, P entries of a client's vector.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from fedsim.config import ConfigError
from fedsim.engine import Batch, Engine, build_engine
from fedsim.engine import graphs as room
from fedsim.engine.graphs import GraphedEngine
from fedsim.params import Layout
from fedsim.streams import Streams
from fedsim.task import PlainSession, Session
from fedsim.tasks.models import MODELS
from fedsim.trees import each
from tests.build import rows_of
from tests.contracts.test_device import REAL, a_gpu, assert_alike, pretended
from tests.contracts.test_device_budgets import KINDS
from tests.device import why_not
from tests.fedsim.engine.zoo import Deciding, Drawing, batch, model, numbers_of, stack

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not REAL and why_not() is not None, reason=str(why_not()))]


@pytest.fixture(autouse=True)
def gpu() -> Iterator[None]:
    with a_gpu():
        yield


def there(b: Batch, seed: int) -> Batch:
    """A batch on the device, of clients whose noise has this seed, with the counts that a plan of batches tells."""
    assert b.streams is not None
    streams = Streams(seed, b.streams.clients.to("cuda") + seed, b.streams.jobs.to("cuda") + seed)
    return Batch(
        each(lambda t: t.to("cuda"), b.inputs),
        each(lambda t: t.to("cuda"), b.targets),
        None if b.weights is None else b.weights.to("cuda"),
        streams,
        b.step,
        None if b.weights is None else b.weights.sum(1).int().tolist(),
    )


def rounds(engine: Engine, x0: Tensor, batches: list[list[Batch]], step: Callable[..., Tensor]) -> list[Tensor]:
    """[losses and where clients are after each round], in a worker's buffers: from round to round in the same place."""
    y, gradient, found = torch.empty_like(x0), torch.empty_like(x0), []
    for seed, steps in enumerate(batches):
        y.copy_(x0)
        for i, b in enumerate(steps):
            k = b.rows[0]
            found.append(step(engine.session(y[:k]), there(b, seed), gradient[:k], seed + i))
        found.append(y.clone())
    return found


def by_gradient(session: Any, b: Batch, out: Tensor, i: int) -> Tensor:
    g, loss = session.gradient(b, out)
    session.x.sub_(g, alpha=0.1 / (1 + i))
    return loss


def fused(session: Any, b: Batch, out: Tensor, i: int) -> Tensor:
    """At a rate that changes from step to step, beside a shift that lies elsewhere every time."""
    lr, shift = 0.1 / (1 + i), torch.full_like(session.x[0], 0.01 * i)
    # as a tensor for a plain session too, for a graph's step has no other
    given = lr if isinstance(session, room.GraphedSession) else torch.full_like(out[0, 0], lr)
    loss = session.sgd_step_(b, given, scale=0.7, shift=shift)
    return by_gradient(session, b, out, i) if loss is None else loss


SLOW = {"resnet": by_gradient, "resnet_bn": fused, "char_lstm": by_gradient}  # which is enough


def plan(name: str, padded: bool) -> list[list[Batch]]:
    """Rounds of some steps of all clients, and of the first two alone."""
    all_of_them, two = ([4, 3, 3], [4, 2]) if padded else ([3, 3, 3], [3, 3])
    sizes = [[all_of_them, all_of_them, two], [all_of_them, two, two], [all_of_them, two]]
    return [
        [batch(name, counts, seed=9 * r + i, padded=padded, step=i) for i, counts in enumerate(steps)]
        for r, steps in enumerate(sizes)
    ]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        if REAL:
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
        assert REAL or torch.equal(mine, theirs)


def both(module: nn.Module, layout: Layout, kind: str = "stacked") -> tuple[GraphedEngine, Engine]:
    """An engine with graphs, and without."""
    graphed, plain = (build_engine(kind, module, layout, device="cuda", graphs=graphs) for graphs in (True, False))
    assert isinstance(graphed, GraphedEngine)
    return graphed, plain


@pytest.mark.parametrize("name, step", [(n, s) for n in MODELS for s in (by_gradient, fused) if SLOW.get(n, s) is s])
def test_replayed_steps_are_those_of_every_model(name: str, step: Callable[..., Tensor]) -> None:
    padded = step is by_gradient
    module, layout, x0 = model(name)
    graphed, plain = both(module.double(), layout)
    x = stack(layout, x0, 3).to("cuda")
    found = rounds(graphed, x, plan(name, padded), step)
    assert_same(found, rounds(plain, x, plan(name, padded), step))
    calls = list(graphed.known.calls.values())
    assert sum(call.believed for call in calls) == 2, "one for three clients and one for two, at any learning rate"
    assert all(call.believed or call.refused for call in calls)


def test_replayed_steps_of_the_loop_engine_are_its_steps() -> None:
    module, layout, x0 = model("mlp")
    graphed, plain = both(module.double(), layout, "loop")
    x, steps = stack(layout, x0, 3).to("cuda"), plan("mlp", False)
    assert_same(rounds(graphed, x, steps, by_gradient), rounds(plain, x, steps, by_gradient))
    assert all(call.believed for call in graphed.known.calls.values())


def test_clients_of_the_loop_engine_may_have_other_numbers_of_samples_in_batches_of_one_shape() -> None:
    module, layout, x0 = model("mlp")
    graphed, plain = both(module.double(), layout, "loop")
    x = stack(layout, x0, 3).to("cuda")
    steps = [[batch("mlp", counts, seed=sum(counts)) for counts in ([4, 3, 1], [1, 4, 2], [2, 4, 4], [4, 1, 3])]]
    assert_same(rounds(graphed, x, steps, by_gradient), rounds(plain, x, steps, by_gradient))


class Masked(Deciding):
    """Has shapes that depend on its data."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(x.flatten(1))
        return out + out[out > 0].mean()


class Unwatched(nn.Module):
    """Refuses to work inside a mode of torch's dispatcher, as a compiled function does."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 7)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(_get_current_dispatch_mode(), room.Watch):
            raise RuntimeError("non-infra torch dispatch mode present")
        out: Tensor = self.fc(x.flatten(1))
        return out


def test_what_cannot_be_watched_goes_on_as_ever() -> None:
    module = Unwatched().double()
    layout, x0 = numbers_of(module)
    (graphed, plain), x = both(module, layout, "loop"), stack(layout, x0, 3).to("cuda")
    steps = plan("mlp", False)
    assert_same(rounds(graphed, x, steps, by_gradient), rounds(plain, x, steps, by_gradient))
    assert all(call.plain for call in graphed.known.calls.values())


def test_a_call_that_cannot_be_watched_is_made_again_from_where_it_began() -> None:
    class Moving(Counting):
        """Moves the buffer, and fails then if it is watched."""

        def field(self, x: Tensor, b: Batch) -> tuple[Tensor, Tensor]:
            x[:, -1] += 1
            if isinstance(_get_current_dispatch_mode(), room.Watch):
                raise RuntimeError("non-infra torch dispatch mode present")
            return torch.zeros_like(x), x.new_zeros(len(x))

    layout = Layout.of_module(nn.BatchNorm1d(2))
    graphed, y = GraphedEngine(Moving(), layout), torch.zeros(3, layout.size, device="cuda")
    b, out = there(plan("logistic", False)[0][0], 0), torch.empty_like(y)
    for _ in range(4):
        graphed.session(y).gradient(b, out)
    assert y[:, -1].tolist() == [4.0] * 3


@pytest.mark.filterwarnings("ignore:.* cannot be batched over clients")
@pytest.mark.parametrize("make", [Deciding, Drawing, Masked])
def test_what_cannot_be_captured_goes_on_as_ever_without_a_word(make: type[nn.Module]) -> None:
    module = make().double()
    layout, x0 = numbers_of(module)
    (graphed, plain), x = both(module, layout), stack(layout, x0, 3).to("cuda")
    steps = plan("mlp", True)
    assert_same(rounds(graphed, x, steps, by_gradient), rounds(plain, x, steps, by_gradient))
    calls = graphed.known.calls.values()
    assert len(calls) == 2 and all(call.plain and call.graph is None for call in calls)


class Counting(Engine):
    """Its gradient is how often it was asked, a number that no graph can know."""

    name = "counting"

    def __init__(self) -> None:
        self.asked = 0

    def session(self, x: Tensor) -> Session:
        return PlainSession(self.field, x)

    def field(self, x: Tensor, b: Batch) -> tuple[Tensor, Tensor]:
        self.asked += 1
        return torch.full_like(x, float(self.asked)), x.new_zeros(len(x))


def test_a_graph_that_gives_other_numbers_is_dropped_with_a_warning() -> None:
    _, layout, x0 = model("logistic")
    steps = plan("logistic", False)[:1] * 2
    graphed, x = GraphedEngine(Counting(), layout), stack(layout, x0, 3).to("cuda")
    y, out = x.clone(), torch.empty_like(x)
    b = there(steps[0][0], 0)
    for call in range(1, 6):
        expects = pytest.warns(UserWarning, match="graph gave other numbers") if call == 3 else nullcontext()
        with expects:
            graphed.session(y).gradient(b, out)
        assert torch.equal(out, torch.full_like(out, call + (call > 2))), (
            "of the third call, the capture asks once more"
        )


def test_calls_that_take_turns_too_long_are_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "MOST", 2)
    module, layout, x0 = model("logistic")
    graphed, plain = both(module.double(), layout)
    x = stack(layout, x0, 3).to("cuda")
    y, b = x.clone(), there(plan("logistic", False)[0][0], 0)

    def call(engine: Engine, scale: float) -> Tensor:
        loss = engine.session(y).sgd_step_(b, torch.full_like(y[0, 0], 0.1) if engine is plain else 0.1, scale=scale)
        assert loss is not None
        return loss

    found = [call(graphed, scale) for scale in (1.0, 2.0, 3.0) * 4]
    assert all(c.graph is None for c in graphed.known.calls.values())
    # a call whose graph was the only one, and is forgotten, is captured again
    found += [call(graphed, scale) for scale in (*(4.0,) * 4, 5.0, 6.0, *(4.0,) * 4)]
    assert [c.believed for c in graphed.known.calls.values()] == [False, True]
    y.copy_(x)
    scales = (*(1.0, 2.0, 3.0) * 4, *(4.0,) * 4, 5.0, 6.0, *(4.0,) * 4)
    assert_same(found, [call(plain, scale) for scale in scales])


def test_threads_have_graphs_of_their_own() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.BatchNorm1d(6), nn.Linear(6, 7)).double()
    layout, x0 = numbers_of(module)
    graphed, plain = both(module, layout)
    x, steps = stack(layout, x0, 3).to("cuda"), plan("mlp", True)
    with ThreadPoolExecutor(3) as workers:
        found = list(workers.map(lambda _: rounds(graphed, x, steps, by_gradient), range(3)))
    for one in found:
        assert_same(one, rounds(plain, x, steps, by_gradient))
    assert not graphed.known.calls, "this thread has made none"


FUSED = {"SGD", "FedProx", "FedDyn", "FedNova"}  # whose learning rate is a number without graphs


@pytest.mark.parametrize("kind", KINDS)
def test_runs_of_ragged_clients_give_what_they_give_without_graphs(kind: str) -> None:
    how = {"strategy": {"name": "fedavg"}, "rule": {"name": "sgd", "lr": 0.05}} | KINDS[kind]
    data = {"name": "blobs", "num_examples": 60, "shape": [5], "num_test": 20}
    config = {
        "rounds": 2,
        "task": {"name": "classification", "dataset": data, "model": {"name": "mlp", "hidden": [4], "dropout": 0.3}},
        "partition": {"name": "dirichlet", "alpha": 1.0},
        "clients": {"count": 3},
        "strategy": how["strategy"],
        "local": {"epochs": 1, "batch_size": 4, "optimizer": how["rule"]},
        "evaluate": {"every": 1},
    }
    graphed, plain, host = (
        rows_of({**config, "runtime": {"workers": 1, "stack": 3, **runtime}})
        for runtime in ({"device": "cuda"}, {"device": "cuda", "graphs": False}, {"device": "cpu"})
    )
    assert_alike(graphed, host)
    assert REAL or kind in FUSED or graphed == plain


def test_graphs_are_held_to_what_a_step_changes_and_not_to_what_there_was() -> None:
    start, nan = torch.tensor([[1.0, -2.0], [3.0, 4.0]]), torch.nan
    step = 1e-4 * torch.tensor([[1.0, 2.0], [-3.0, 4.0]])
    assert room.agree(start + 1.001 * step, start + step, start), "sums in another order"
    assert not room.agree(start, start + step, start), "nothing was done"
    assert not room.agree(start + 1.1 * step, start + step, start), "at another learning rate"
    assert not room.agree(start + step.flip(0), start + step, start), "for other clients"
    assert room.agree(start * nan, start * nan, start) and not room.agree(start * nan, start, start)


@pytest.mark.parametrize("runtime", [{"device": "cpu"}, {"device": "cuda", "engine": "compiled"}], ids=str)
def test_graphs_where_there_can_be_none_are_one_message(runtime: dict[str, Any]) -> None:
    config = {"task": {"name": "classification", "dataset": "digits"}, "runtime": {**runtime, "graphs": True}}
    with pytest.raises(
        ConfigError, match="runtime: graphs=true is for a GPU and engine loop or stacked, .* graphs=auto"
    ):
        rows_of(config)


# The pretend graphs themselves -----------------------------------------------------------------------------------


@pretended
def test_a_capture_does_nothing_and_a_replay_reads_the_memory_that_was_captured() -> None:
    x, number, graph = torch.ones(2, device="cuda"), torch.full((), 2.0, device="cuda"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        x.mul_(number).add_(1.0)
        y = x[:1] + x.new_zeros(1)
    assert x.tolist() == [1.0, 1.0] and y.isnan().all()
    graph.replay()
    assert x.tolist() == [3.0, 3.0] and y.tolist() == [3.0]
    number.fill_(10.0)
    graph.replay()
    assert x.tolist() == [31.0, 31.0] and y.tolist() == [31.0]


@pretended
@pytest.mark.parametrize("wait", [Tensor.item, Tensor.cpu, lambda x: x.new_tensor([1.0]), lambda x: x[x > 0]])
def test_waits_cannot_be_captured(wait: Callable[[Tensor], Any]) -> None:
    x = torch.ones((), device="cuda")
    capture = torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="thread_local")
    with pytest.raises(RuntimeError, match="capturing"), capture:
        wait(x)


@pretended
def test_a_replay_spoils_what_other_graphs_left_in_a_shared_pool() -> None:
    x, graphs = torch.ones(2, device="cuda"), [torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()]
    made, pool = [], torch.cuda.graph_pool_handle()
    for graph in graphs:
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            made.append(x + 1)
    graphs[0].replay()
    graphs[1].replay()
    assert made[0].isnan().all() and made[1].tolist() == [2.0, 2.0]
