"""What several streams of a GPU do must be in order: those of workers in one process, and that of copies from the host.

On the pretend GPU races are looked for (`tests.device_streams`); `test_device` runs every strategy so. On a real one
the bits of the same runs are compared.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from fedsim.compose import compose
from fedsim.config import ConfigError
from fedsim.sim import lanes
from fedsim.sim.lanes import Errand, Lanes
from fedsim.sim.packing import pack, unpack
from fedsim.sim.seam import _span as span
from fedsim.tasks.staging import AHEAD, Staged
from fedsim.tasks.supervised import SupervisedTask
from tests.composition import pair
from tests.contracts.test_device import a_gpu, full, pretended, run, streams
from tests.contracts.test_device_budgets import second_round
from tests.contracts.test_optimizers import section
from tests.device import Pretend, pretend_gpu, why_not
from tests.device_streams import Event, Race, Stream, pretend_streams

REAL = torch.cuda.is_available()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not REAL and why_not() is not None, reason=str(why_not()))]
CUDA = {"device": "cuda", "workers": 1}
DIGITS = {
    "rounds": 2,
    "partition": "iid",
    "clients": {"count": 6},
    "strategy": {"name": "fedavg"},
    "local": {"steps": 2, "batch_size": 8, "optimizer": {"name": "sgd", "lr": 0.05}},
    "evaluate": {"every": 1, "per_client": True},
}


def digits(model: Any = "logistic", task: str = "classification", **sections: Any) -> dict[str, Any]:
    models = {"model": model} if model else {}
    return {**DIGITS, "task": {"name": task, "dataset": "digits", **models}, **sections}


# The detector ----------------------------------------------------------------------------------------------------


def on(stream: Any, work: Callable[[], Any]) -> Any:
    with torch.cuda.stream(stream):
        return work()


@pretended
def test_reading_on_another_stream_needs_an_event() -> None:
    with pretend_gpu(), pretend_streams() as watch:
        main, other, third = torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream()
        x = torch.zeros(3, device="cuda")
        with pytest.raises(Race, match=r"stream \d+ at .*test_device_streams.py:.* does not wait for stream 0 at"):
            on(other, lambda: x + 1)
        watch.races.clear()
        event = main.record_event()
        y = x * 2  # after the event
        other.wait_event(event)
        on(other, lambda: x + 1)
        with pytest.raises(Race):
            on(other, lambda: y + 1)
        watch.races.clear()
        third.wait_stream(other)  # which waited for main's event
        on(third, lambda: x + 1)
        torch.cuda.synchronize()
        on(other, lambda: y + 1)


@pretended
def test_writing_needs_those_that_read() -> None:
    with pretend_gpu(), pretend_streams() as watch:
        other = torch.cuda.Stream()
        x = torch.zeros(3).to("cuda")  # the host waited for it
        on(other, lambda: x + 1)
        x + 1  # two may read
        with pytest.raises(Race, match="stream 0 at"):
            x.add_(1)
        watch.races.clear()
        other.synchronize()
        x.add_(1)


@pretended
def test_a_backward_pass_runs_on_the_stream_of_its_forward_pass() -> None:
    with pretend_gpu(), pretend_streams() as watch:
        other = torch.cuda.Stream()

        def gradient() -> Tensor:
            x = torch.ones(3, device="cuda", requires_grad=True)
            (x * x * 2).sum().backward()
            assert x.grad is not None
            return x.grad

        g = on(other, gradient)
        with pytest.raises(Race):
            g + 1
        torch.cuda.current_stream().wait_stream(other)
        assert (g + 1).tolist() == [5.0] * 3
        g.record_stream(torch.cuda.current_stream())
        watch.races.clear()


@pretended
def test_memory_that_another_stream_reads_is_announced_or_waited_for() -> None:
    def take(announce: bool, wait: bool) -> None:
        with pretend_gpu(), pretend_streams():
            other = torch.cuda.Stream()
            x = on(other, lambda: torch.zeros(3, device="cuda"))
            torch.cuda.current_stream().wait_stream(other)
            x + 1
            if announce:
                x.record_stream(torch.cuda.current_stream())
            if wait:
                other.wait_stream(torch.cuda.current_stream())
            del x

    take(True, False)
    take(False, True)
    with pytest.raises(Race, match=r"memory of stream \d+ is let go while stream 0 uses it"):
        take(False, False)


@pretended
def test_page_locked_memory_is_left_alone_until_its_copy_is_done() -> None:
    def send(wait: bool) -> None:
        with pretend_gpu() as counts, pretend_streams():
            x = torch.zeros(3, pin_memory=True)
            assert x.is_pinned() and x[1:].is_pinned() and not torch.zeros(3).is_pinned()
            there = x.to("cuda", non_blocking=True)
            assert counts.waits == 0
            if wait:
                torch.cuda.current_stream().synchronize()
            x.fill_(1)
            assert there.tolist() == [0.0] * 3

    send(True)
    with pytest.raises(Race, match="page-locked memory changed before its copy was done"):
        send(False)


# Workers of one process, and data on the host --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fedavg", "scaffold_m", "fedbuff"])
def test_neither_workers_nor_the_place_of_data_change_the_bits(name: str) -> None:
    with a_gpu():
        expected = run(pair(name, None), "cuda", data="device")
    for more in ({"data": "device", "workers": 2}, {"data": "host", "workers": 3}):
        with streams():
            assert run(pair(name, None), "cuda", **more) == expected


GAMES = {"name": "extragradient", "lr": 0.05}
CONFIGS: dict[str, dict[str, Any]] = {
    "convolutions": digits("cnn"),
    "a module that is called as it is": digits("tests.fedsim.engine.zoo:drawing"),
    "per-sample gradients": digits(local={"steps": 1, "optimizer": {**section("adamw"), "dp": {"clip": 1.0}}}),
    "poisoned samples": digits(clients={"count": 6, "byzantine": {"count": 2, "attack": "backdoor"}}),
    "models evaluated by their owners": digits(data={"client_test": 0.3}, evaluate={"personalise": {"epochs": 1}}),
    "adversarial": digits(task="adversarial", strategy=GAMES, local={}),
    "gan": digits(None, task="gan", local={"steps": 1}),
}


@pytest.mark.filterwarnings("ignore:Drawing cannot be batched")
@pytest.mark.parametrize("what", CONFIGS)
def test_every_use_of_samples_has_its_bits_from_the_host(what: str) -> None:
    with a_gpu():
        expected = run(CONFIGS[what], "cuda", data="device")
    with streams():
        assert run(CONFIGS[what], "cuda", data="host", workers=2) == expected


@pytest.mark.parametrize("name", ["adafactor", "dct_lowrank", "frugal", "galore", "muon"])
def test_tables_that_optimizers_make_once_are_there_for_all_streams(name: str) -> None:
    config = digits(local={"steps": 2, "batch_size": 8, "optimizer": section(name)}, rounds=1)
    with streams():  # raises where one is not, and two workers read it first
        together = run(config, "cuda", workers=2)
    with streams():
        assert together == run(config, "cuda", workers=1)


def give_and_take() -> Tensor:
    """What a worker makes of a tensor that only it was given."""
    lanes = Lanes(torch.device("cuda"))
    with ThreadPoolExecutor(1, initializer=lanes.open, initargs=(1,)) as pool:
        errand = lanes.give(partial(torch.neg, torch.ones(3, device="cuda")), pool)
        pool.shutdown(wait=True)  # the worker has let it go
        return errand.result()


def test_a_worker_is_given_a_tensor_and_gives_another() -> None:
    with streams():
        assert (give_and_take() + 1).tolist() == [0.0] * 3


def run_digits() -> None:
    run(digits(), "cuda", workers=2, data="host")


def nothing(*args: Any, **kwargs: Any) -> None:
    return None


def forgetful(self: Lanes, call: Callable[[], Any], pool: Any) -> Errand[Any]:
    """`Lanes.give` that does not hold what the worker was given."""
    return Errand(self, nothing, pool.submit(self._do, call, self._point()))


def hasty(self: Lanes, call: Callable[[], Any], given: Any) -> Any:
    """`Lanes._do` that does not wait for what it was given."""
    return call(), self._point()


def taken(self: Errand[Any]) -> Any:
    """`Errand.result` that does not wait for it."""
    return self.future.result()[0]


REMOVED: dict[str, tuple[Any, str, Any, Callable[[], Any]]] = {
    "waiting for what was given": (Lanes, "_do", hasty, run_digits),
    "waiting for what was made": (Errand, "result", taken, run_digits),
    "arguments being held": (Lanes, "give", forgetful, give_and_take),
    "results being announced": (lanes, "_announce", nothing, run_digits),
    "waiting for copies": (Stream, "wait_stream", nothing, run_digits),
    "batches being announced": (Tensor, "record_stream", nothing, run_digits),
}


@pretended
@pytest.mark.parametrize("what", REMOVED)
def test_a_race_is_found_without(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, other, work = REMOVED[what]
    with pytest.raises(RuntimeError, match="does not wait for|is let go while"), streams():
        monkeypatch.setattr(Pretend if owner is Tensor else owner, name, other)
        work()


# Where samples lie -----------------------------------------------------------------------------------------------


def test_samples_come_from_the_host_as_they_are_there() -> None:
    pool = {"x": torch.randn(40, 3, 2), "mask": torch.rand(40) > 0.5}
    rows = torch.tensor([[3, 39, 0], [7, 7, 1]])
    with streams():
        read = Staged(torch.device("cuda"))
        for which in (rows, rows[0], slice(5, 9)):
            found = read(pool, which)
            assert isinstance(found, dict) and all(t.device.type == "cuda" for t in found.values())
            assert all(torch.equal(found[name].cpu(), t[which]) for name, t in pool.items())


@pretended
def test_the_host_gathers_few_minibatches_ahead_and_waits_for_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    waited = list[int]()
    monkeypatch.setattr(Event, "synchronize", lambda event: waited.append(event.number))
    with pretend_gpu() as counts, pretend_streams():
        read, pool, rows = Staged(torch.device("cuda")), torch.zeros(9, 4), torch.zeros(2, 3).long()
        for _ in range(6):
            read(pool, rows)
    assert len(waited) == 6 - AHEAD and waited == sorted(waited)
    assert counts.waits == 0 and counts.bytes_up == 6 * 2 * 3 * 4 * 4


@pretended
def test_a_step_with_samples_on_the_host_copies_its_minibatch_and_waits_for_nothing_new() -> None:
    here, there, longer = second_round(4, 3), second_round(4, 3, data="host"), second_round(4, 5, data="host")
    inputs, labels = 8 * 64 * 4, 8 * 8  # bytes of a client's minibatch
    assert there.bytes_up - here.bytes_up == 4 * 3 * (inputs + labels)
    assert there.bytes_down - here.bytes_down == 4 * 3 * labels  # which rows
    assert longer.bytes_up - there.bytes_up == 4 * 2 * (inputs + labels)
    assert there.waits - here.waits == 1 + 4 and longer.waits - there.waits == 2  # the rows; events of earlier steps


@pretended
@pytest.mark.parametrize("size, wanted", [(2**40, "device"), (2**20, "host")])
def test_samples_lie_on_the_device_where_they_surely_have_room(size: int, wanted: str) -> None:
    about = SimpleNamespace(total_memory=size)
    with pretend_gpu(), mock.patch.object(torch.cuda, "get_device_properties", lambda device: about):
        made = compose({**DIGITS, "task": {"name": "classification", "dataset": "digits"}, "runtime": CUDA}, "config")
        made.close()
    assert made.resolved["runtime"]["data"] == wanted
    assert made.plan["samples"] == ("on the device" if wanted == "device" else "in RAM")


@pretended
def test_samples_that_the_device_has_no_room_for_name_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsim.data.federated.FederatedData.to", full)
    with pretend_gpu(), pretend_streams():
        with pytest.raises(ConfigError, match="no room on the GPU .*; set runtime.data=host, take a larger card, or"):
            run(digits(), "cuda")
        assert run(digits(), "cuda", data="host")


def test_workers_of_one_machine_read_from_one_copy_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsim.sim.packing.SMALLEST_SHARED", 1)
    with streams():
        made = compose({**digits(), "runtime": {**CUDA, "data": "host"}}, "config")
        task, pool = made.experiment.task, made.executor
        stream, buffers = pack(task, share=True)
        sent = stream, [buffer.copy() for buffer in buffers]  # a store's, which hands out views of them
        lie = [span(torch.from_numpy(buffer)) for buffer in sent[1]]
        for buffer in sent[1]:
            buffer.setflags(write=False)
        for other in (unpack(sent), unpack(sent)):
            assert isinstance(other, SupervisedTask) and isinstance(other.data.inputs, Tensor)
            assert other.device.type == "cuda" and span(other.data.inputs) in lie
            x = other.x0.to("cuda")
            assert other.evaluate(x, pool) == task.evaluate(x, pool)
        made.close()
