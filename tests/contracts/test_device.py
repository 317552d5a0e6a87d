"""What every table must hold on a device that is not the host: the numbers of a CPU, and no mixed devices.

The device is the machine's own GPU where it has one (`make gpu`). Elsewhere it is a pretend one (`tests.device`), whose
numbers are a CPU's up to the order of sums; what it finds is tensors on the wrong device. How often it waits is held by
`test_device_budgets`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from math import isclose
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from fedsim import pages
from fedsim.aggregate import AGGREGATORS, PRE_AGGREGATORS
from fedsim.clients.byzantine import ATTACKS
from fedsim.compose import compose
from fedsim.compress import COMPRESSORS
from fedsim.config import ConfigError
from fedsim.engine import Batch, build_engine
from fedsim.engine.build import ENGINES
from fedsim.optim import build
from fedsim.params import Layout
from fedsim.sim.byzantine import Knowledge
from fedsim.sim.packing import pack
from fedsim.sim.place import Place
from fedsim.sim.ray_worker import Actor
from fedsim.strategies import STRATEGIES
from fedsim.streams import Streams
from fedsim.tasks.models import MODELS, init_parameters
from fedsim.tasks.quadratic import QuadraticTask
from tests.build import Rows, cohort, drawn, local_sgd, rows_of
from tests.composition import pair
from tests.contracts.test_aggregators import build as build_rule
from tests.contracts.test_aggregators import rows as drawn_rows
from tests.contracts.test_attacks import TO_ALL
from tests.contracts.test_compressors import SETTINGS, stack
from tests.contracts.test_optimizers import LAYOUT, NAMES, problem, section
from tests.device import Counts, pretend_gpu, why_not
from tests.device_streams import pretend_streams
from tests.fedsim.engine import zoo

REAL = torch.cuda.is_available()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not REAL and why_not() is not None, reason=str(why_not())),
    pytest.mark.filterwarnings("ignore:.*does not have a deterministic implementation"),
]
pretended = pytest.mark.skipif(REAL, reason="about the pretend GPU")


@pytest.fixture
def gpu() -> Iterator[Counts]:
    with pretend_gpu() as counts:
        yield counts


@contextmanager
def a_gpu() -> Iterator[None]:
    """The machine's own, or else a pretend one."""
    with nullcontext() if REAL else pretend_gpu():
        yield


@contextmanager
def streams() -> Iterator[None]:
    """The same, with streams that pretend too, and a look for races between them."""
    with a_gpu(), nullcontext() if REAL else pretend_streams():
        yield


def run(config: dict[str, Any], device: str, folder: Path | None = None, resume: bool = False, **runtime: Any) -> Rows:
    """The rows of a run on a device, in this process however many GPUs there are."""
    here = {"executor": "in_process", "workers": 1, "stack": 3, "device": device, **runtime}
    return rows_of({**config, "runtime": here}, folder, resume)


def assert_alike(rows: Rows, others: Rows) -> None:
    assert len(rows) == len(others) > 0
    for row, other in zip(rows, others, strict=True):
        assert row.keys() == other.keys()
        for key, value in row.items():
            if isinstance(value, float):
                assert isclose(value, other[key], rel_tol=1e-4, abs_tol=1e-4), (key, value, other[key])
            elif not isinstance(value, list):
                assert value == other[key], key


def keyed(rows: int, device: str) -> Streams:
    return Streams(5, torch.arange(rows).to(device), torch.zeros(rows, dtype=torch.int64).to(device))


def assert_same_on_both(compute: Callable[[str], list[Tensor]], tolerance: float = 1e-6) -> None:
    """What `compute(device)` gives lies on the device, and is the same on the host."""
    expected = compute("cpu")
    with a_gpu():
        found = compute("cuda")
        assert len(found) == len(expected) and all(t.device.type == "cuda" for t in found)
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine.cpu(), theirs, rtol=tolerance, atol=tolerance, equal_nan=True)


# The device itself -----------------------------------------------------------------------------------------------


@pretended
def test_tensors_of_two_devices_do_not_mix(gpu: Counts) -> None:
    x = torch.ones(3, 2, device="cuda")
    for mixed in (lambda: x + torch.ones(3, 2), lambda: torch.ones(2) @ x.T, lambda: torch.cat([x, torch.ones(1, 2)])):
        with pytest.raises(RuntimeError, match="same device"):
            mixed()
    assert torch.equal((x * torch.tensor(2.0) + x[torch.tensor([1, 0, 2])]).cpu(), torch.full((3, 2), 3.0))
    with pytest.raises(TypeError, match="numpy"):
        np.asarray(x)


@pretended
def test_launches_waits_and_bytes_are_counted(gpu: Counts) -> None:
    x = torch.zeros(4, 2).to("cuda")  # an allocation, and a copy from memory that is not pinned
    assert (gpu.launches, gpu.waits, gpu.bytes_up, gpu.bytes_down) == (0, 1, 32, 0)
    y = (x.view(8)[:2] + 1).sum()
    assert (gpu.launches, gpu.waits) == (2, 1)
    assert float(y) == 2.0 and x.cpu().shape == (4, 2)
    assert (gpu.launches, gpu.waits, gpu.bytes_down) == (3, 3, 32)
    x[x > 0]
    assert gpu.waits == 4 and sum(n for _, n in gpu.where("waits")) == 4


# The tables ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_gives_the_numbers_of_the_cpu(name: str) -> None:
    expected = run(pair(name, None), "cpu")
    with streams():
        assert_alike(run(pair(name, None), "cuda", workers=2, data="host"), expected)


@pytest.mark.skipif(not REAL, reason="a pretend GPU computes as the CPU does")
def test_every_strategy_gives_the_same_bits_again_on_one_card() -> None:
    for name in STRATEGIES:
        assert run(pair(name, None), "cuda") == run(pair(name, None), "cuda"), name


@pretended
def test_a_process_that_computes_on_a_card_asks_for_the_same_order_of_sums(gpu: Counts) -> None:
    asked = []
    with mock.patch.object(torch, "use_deterministic_algorithms", lambda mode, warn_only: asked.append(mode)):
        compose({**pair("fedavg", None), "runtime": {"device": "cpu"}}, "config").close()
        assert asked == []
        compose({**pair("fedavg", None), "runtime": {"device": "cuda"}}, "config").close()
        assert asked == [True] and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        worker = object.__new__(Actor)  # without setting this process's threads
        worker._runner = None
        worker._open(pack((None, None, 0, torch.device("cuda"), None)))
        assert asked == [True, True]


@pytest.mark.parametrize("option", ["uplink top_k, error feedback", "NNM before it", "server Adam", "local AdamW"])
def test_what_runs_beside_a_strategy_gives_the_numbers_of_the_cpu(option: str) -> None:
    expected = run(pair("fedavg", option), "cpu")
    with a_gpu():
        assert_alike(run(pair("fedavg", option), "cuda"), expected)


@pytest.mark.parametrize(
    "rule",
    [
        {"name": "sophia_g"},
        {"name": "sophia_h"},
        {"name": "adamw", "zeroth_order": {}},
        {"name": "adamw", "dp": {"clip": 1.0, "noise": 0.5}},
        {"name": "adamw", "state_scope": "client"},
        {"name": "adamw", "state_scope": "server"},
        {"name": "torch.optim:AdamW"},
    ],
    ids=lambda rule: " ".join(map(str, rule.values())),
)
@pytest.mark.filterwarnings("ignore:.*not batched")
def test_what_optimizers_need_or_keep_gives_the_numbers_of_the_cpu(rule: dict[str, Any]) -> None:
    config = pair("fedavg", None)
    config["local"] = {**config["local"], "optimizer": {"lr": 0.01, **rule}}
    expected = run(config, "cpu")
    with a_gpu():
        assert_alike(run(config, "cuda"), expected)


@pytest.mark.parametrize("task", ["quadratic task", "bilinear task"])
def test_tasks_in_closed_form_give_the_numbers_of_the_cpu(task: str) -> None:
    expected = run(pair("extragradient", task), "cpu")
    with a_gpu():
        assert_alike(run(pair("extragradient", task), "cuda"), expected)


# a whole LSTM is a kernel of its own on a GPU, which nothing here can pretend; the stacked engine does without
@pytest.mark.parametrize(
    "engine, model", [(e, m) for e in ENGINES for m in MODELS if m != "char_lstm" or e == "stacked"]
)
def test_every_engine_gives_the_gradient_and_the_logits_of_the_cpu(engine: str, model: str) -> None:
    words = model in ("char_lstm", "transformer")
    shape, classes = ((6,), 9) if words else ((1, 8, 8), 4)
    module, x0 = init_parameters(lambda: MODELS[model](shape, classes), 0)
    draw = torch.Generator().manual_seed(1)
    x = x0 + 0.1 * torch.randn(2, len(x0), generator=draw)
    inputs = torch.randint(9, (2, 5, 6), generator=draw) if words else torch.randn(2, 5, *shape, generator=draw)
    targets = torch.randint(classes, (2, 5, 6) if words else (2, 5), generator=draw)
    weights = torch.tensor([[1.0] * 5, [1.0] * 3 + [0.0] * 2])

    def compute(device: str) -> list[Tensor]:
        kind = "loop" if device == "cpu" else engine  # an independent one, and torch.compile takes its time there
        made = build_engine(kind, module, Layout.of_module(module), "cross_entropy", torch.device(device))
        start, given = x.to(device), inputs.to(device)
        batch = Batch(given, targets.to(device), weights.to(device), keyed(2, device))
        g, loss = made.session(start.clone()).gradient(batch)
        return [g, loss] if model == "char_lstm" else [g, loss, made.logits(start[0].clone(), given[0])]

    assert_same_on_both(compute, 2e-5)


@pytest.mark.parametrize("model", ["mlp", "cnn", "transformer"])
def test_products_of_lower_precision_come_close(model: str) -> None:
    module, layout, x0 = zoo.model(model, dropout=False)
    module, x, host = module.float(), x0.float().repeat(2, 1), zoo.batch(model, [5, 3], padded=False)
    inputs = host.inputs if model in zoo.SEQUENCES else host.inputs.float()

    def gradient(device: str, engine: str, precision: str) -> Tensor:
        made = build_engine(engine, module, layout, "cross_entropy", torch.device(device), precision=precision)
        batch = Batch(inputs.to(device), host.targets.to(device), None, keyed(2, device))
        return made.session(x.to(device)).gradient(batch)[0].cpu()

    expected = gradient("cpu", "loop", "fp32")
    with a_gpu():
        for precision, share in (("tf32", 0.01), ("bf16", 0.2)):
            found = gradient("cuda", "stacked", precision)
            assert (found - expected).norm() <= share * expected.norm(), precision


@pytest.mark.parametrize(
    "more", [{}, {"clip": {"global": 0.5}, "average": {"name": "ema"}}, {"state_dtype": "dyn8"}], ids=str
)
@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_steps_as_on_the_cpu(name: str, more: dict[str, Any]) -> None:
    x, grads = problem(clients=3)
    more = {"precision": "full"} | more if name == "muon" else more  # on a GPU it multiplies in bfloat16

    def compute(device: str) -> list[Tensor]:
        optimizer = build(section(name, backend="eager", **more), LAYOUT)
        y = x.to(device, copy=True)
        state = optimizer.init(y)
        for g in grads[:3]:
            optimizer.step_(y, g.to(device), state, streams=keyed(3, device))
        return [y, optimizer.final(y, state)]

    assert_same_on_both(compute, 1e-5)


@pytest.mark.parametrize("name", COMPRESSORS)
def test_every_compressor_sends_what_it_sends_on_the_cpu(name: str) -> None:
    def compute(device: str) -> list[Tensor]:
        packets = [COMPRESSORS[name](**s).encode(stack(4).to(device), keyed(4, device)) for s in SETTINGS[name]]
        return [value for packet in packets for value in (packet.decode(), packet.bits.to(device))]

    assert_same_on_both(compute)


@pytest.mark.parametrize("name", AGGREGATORS)
@pytest.mark.parametrize("bad", [False, True])
def test_every_aggregator_gives_what_it_gives_on_the_cpu(name: str, bad: bool) -> None:
    v = drawn_rows()
    v[3], v[5] = (torch.nan, torch.inf) if bad else (v[4], v[4])  # rows that are not finite, or alike

    def compute(device: str) -> list[Tensor]:
        return [build_rule(AGGREGATORS, name, 2)(v.to(device), torch.ones(len(v)).to(device))]

    assert_same_on_both(compute)


@pytest.mark.parametrize("name", PRE_AGGREGATORS)
def test_every_pre_aggregator_gives_what_it_gives_on_the_cpu(name: str) -> None:
    def compute(device: str) -> list[Tensor]:
        v = drawn_rows().to(device)
        return list(build_rule(PRE_AGGREGATORS, name, 2)(v, v.new_ones(len(v)), np.random.default_rng(0)))

    assert_same_on_both(compute)


@pytest.mark.parametrize("name", TO_ALL)
def test_every_attack_sends_what_it_sends_on_the_cpu(name: str) -> None:
    def compute(device: str) -> list[Tensor]:
        rows = drawn_rows().to(device)
        sent = ATTACKS[name]()(rows, 2, keyed(2, device), Knowledge(step=3, own=rows[:2]))
        return [] if sent is None else [sent]

    assert_same_on_both(compute)


# What is kept ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["scaffold_m", "fedbuff", "masha2"])
def test_a_run_that_was_stopped_and_resumed_on_the_device_equals_one_that_was_not(name: str, tmp_path: Path) -> None:
    config = {**pair(name, None), "evaluate": {"every": 2, "per_client": True}}
    with a_gpu():
        whole = run({**config, "rounds": 4}, "cuda")
        run({**config, "rounds": 2}, "cuda", tmp_path)
        assert run({**config, "rounds": 4}, "cuda", tmp_path, resume=True) == whole[2:]


@pytest.mark.parametrize(
    "name, option",
    [("scaffold_m", None), ("monna", None), ("masha2", None), ("fedbuff", "uplink top_k, error feedback")],
)
def test_rows_of_clients_are_the_same_bits_wherever_they_lie(name: str, option: str | None, tmp_path: Path) -> None:
    config = {**pair(name, option), "evaluate": {"every": 1}}
    with a_gpu():
        expected = run({**config, "rounds": 4}, "cuda", memory="ram")
        assert run({**config, "rounds": 2}, "cuda", tmp_path, memory="device") == expected[:2]
        assert run({**config, "rounds": 3}, "cuda", tmp_path, resume=True, memory="ram") == expected[2:3]
        assert run({**config, "rounds": 4}, "cuda", tmp_path, resume=True, memory="device") == expected[3:]


@pretended
def test_rows_that_the_device_has_no_room_for_are_one_message_and_go_on_elsewhere(
    gpu: Counts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {**pair("scaffold", None), "rounds": 2, "evaluate": {"every": 1}}
    expected = run(config, "cuda", memory="ram")

    run({**config, "rounds": 1}, "cuda", tmp_path, memory="device")
    with monkeypatch.context() as patch:
        patch.setattr("fedsim.stores.pages", SimpleNamespace(empty=full, room_on_gpu=pages.room_on_gpu))
        message = (
            r"runtime.memory: the rows of . clients \(0.0 GB\) have no room on the GPU \(OutOfMemoryError: .*\); take "
            "runtime.memory=ram or disk"
        )
        with pytest.raises(ConfigError, match=message):
            run(config, "cuda", tmp_path, resume=True, memory="device")
    assert run(config, "cuda", tmp_path, resume=True, memory="ram") == expected[1:]


def full(*args: Any, **kwargs: Any) -> Any:
    """What a card says that has no room."""
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB\nand more")


FULL = {
    "a stack": (
        "fedsim.clients.local_training.LocalTraining.__call__",
        "round 1 has no room .*; lower runtime.stack if",
    ),
    "the server": ("fedsim.strategies.fedavg.FedAvg.step", "round 1 has no room on the GPU .*take a smaller model"),
    "an evaluation": ("fedsim.evaluation.Evaluate.metrics", "round 1 has no room on the GPU"),
    "the data": ("fedsim.compose.root.task_of", "runtime.device: the data and the model have no room .*a larger card"),
}


@pretended
@pytest.mark.parametrize("what", FULL)
def test_a_card_that_is_full_is_one_message(what: str, gpu: Counts, monkeypatch: pytest.MonkeyPatch) -> None:
    place, message = FULL[what]
    monkeypatch.setattr(place, full)
    with pytest.raises(ConfigError, match=message) as raised:
        run({**pair("fedavg", None), "rounds": 1}, "cuda")
    assert "(OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB)" in str(raised.value)


@pretended
def test_a_model_that_is_too_large_for_one_client_is_refused_before_anything_starts(gpu: Counts) -> None:
    config = {
        "task": {"name": "classification", "dataset": "digits", "model": {"name": "mlp", "hidden": [1000]}},
        "runtime": {"device": "cuda"},
    }
    small = mock.patch.object(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=2**19))
    words = "runtime: 75,010 parameters take 0.0 GiB for one client alone, and the GPU has"
    with small, pytest.raises(ConfigError, match=words):
        rows_of(config)


@pretended
@pytest.mark.parametrize("executor", ["ray", "torchrun"])
def test_rows_lie_on_the_device_only_in_the_process_that_computes(
    executor: str, gpu: Counts, monkeypatch: pytest.MonkeyPatch
) -> None:
    if executor == "torchrun":
        monkeypatch.setattr("fedsim.compose.fleets.place", lambda: Place(0, 0, 1, 1, "here"))
        monkeypatch.setattr("fedsim.compose.fleets.take_gpu", lambda here: None)
    config = {**pair("scaffold", None), "runtime": {"device": "cuda", "executor": executor, "memory": "device"}}
    with pytest.raises(ConfigError, match="runtime.memory: device is for stacks that this process computes itself"):
        rows_of(config)


@pretended
def test_a_card_that_is_named_has_to_be_there_and_is_used_alone(gpu: Counts) -> None:
    with pytest.raises(ConfigError, match=r"runtime.device: 'cuda:7' was asked for, and 1 GPU\(s\) are visible"):
        run(pair("fedavg", None), "cuda:7")
    config = {**pair("fedavg", None), "runtime": {"device": "cuda:0"}}
    with mock.patch.object(torch.cuda, "device_count", lambda: 2):
        composition = compose(config, "config")
        composition.close()
        assert composition.plan["workers"].endswith("in this process, 1 intra-op thread(s) each")
        config["runtime"] |= {"executor": "ray"}
        with pytest.raises(ConfigError, match="each Ray worker takes a GPU of its own; use cuda, not 'cuda:0'"):
            compose(config, "config")


class OnceInfinite(QuadraticTask):
    """A quadratic on which client 1 gets a gradient that is not finite, in its second step."""

    def field(self, x: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
        g, loss = super().field(x, batch)
        return torch.where((batch.rows == 1)[:, None] & (batch.step == 1), torch.inf, g), loss

    def to(self, device: torch.device) -> OnceInfinite:
        return OnceInfinite(*(t.to(device) for t in (self.a, self.b, self.x0)), self.noise, self.num_examples)


@pytest.mark.parametrize("rule", [{"name": "adamw", "lr": 0.1}, {"name": "sgd", "lr": 0.1, "momentum": 0.9}])
def test_a_step_that_is_left_out_is_left_out_on_the_device_too(rule: dict[str, Any]) -> None:
    plain = drawn(3, 4)
    task = OnceInfinite(plain.a, plain.b, plain.x0)
    left_out = []

    def compute(device: str) -> list[Tensor]:
        here = task.to(torch.device(device))
        clients = cohort(here, [0, 1, 2], device=device)
        result = local_sgd(here, optimizer=rule, steps=4)(clients, here.init(0))
        left_out.append(clients.metrics["skipped_steps"].tolist())
        return [result.delta.dense()]

    assert_same_on_both(compute, 1e-12)
    assert left_out == [[0.0, 1.0, 0.0]] * 2
