"""What drives Ray hands on what lay on a GPU and leaves the GPU alone. Ray is played by this process."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedsim.sim.executor import StackRunner
from fedsim.sim.in_process import InProcess
from fedsim.sim.packing import Parcel, pack, unpack
from fedsim.sim.pipe import Pipe
from fedsim.sim.ray_executor import RayExecutor
from tests.device import Counts, pretend_gpu, why_not
from tests.fedsim.sim.ray_cases import assert_same_bits, runner, some_jobs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.is_available() or why_not() is not None, reason="about the pretend GPU"),
]


@pytest.fixture
def gpu() -> Iterator[Counts]:
    with pretend_gpu() as counts:
        yield counts


class OneWorker:
    """What a pool of Ray workers is asked, done by one in this process."""

    def __init__(self, actor: type, setting: Parcel, *, threads: int, **_: Any) -> None:
        worker = actor(threads)
        named = {name: SimpleNamespace(remote=getattr(worker, name)) for name in ("run", "map")}
        self.workers = [SimpleNamespace(actor=SimpleNamespace(**named))]
        self.setting, self.ray = setting, SimpleNamespace(put=lambda parcel: parcel)

    def in_order(self, count: int, ask: Callable[[Any, int], Any], *_: Any) -> Iterator[Any]:
        return (ask(self.workers[0], call) for call in range(count))

    def close(self) -> None:
        pass


@pytest.mark.parametrize("fold", [True, False])
def test_results_of_workers_lie_where_those_of_the_process_itself_do(
    gpu: Counts, fold: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedsim.sim.ray_driver.RayPool", OneWorker)
    device, plain = torch.device("cuda"), runner()
    on_gpu = StackRunner(plain.task.to(device), plain.strategy, plain.seed, device)
    jobs = some_jobs(fold=fold, num_models=1 if fold else 3)
    jobs.models = [{"x": model["x"].to(device)} for model in jobs.models]
    there = RayExecutor(on_gpu, width=10, collectives="object_store").run(jobs)
    process = InProcess(on_gpu, width=10)
    here = process.run(jobs)
    process.close()
    assert_same_bits(there, here)
    kinds = [(named[k].device.type, k) for named in (there.fields, there.sums, there.memory) for k in sorted(named)]
    assert kinds == [
        (named[k].device.type, k) for named in (here.fields, here.sums, here.memory) for k in sorted(named)
    ]
    assert ("cuda", "delta") in kinds and ("cpu", "c") in kinds


def test_handing_on_what_lies_on_a_gpu_moves_nothing(gpu: Counts) -> None:
    x = torch.arange(1 << 19, dtype=torch.float32, device="cuda")
    parcel, (here, there) = pack({"x": x}, share=True), (Pipe(end) for end in socket.socketpair())
    before = gpu.launches, gpu.waits, gpu.bytes_up, gpu.bytes_down
    sender = threading.Thread(target=here.send, args=("parcel", parcel))
    sender.start()
    _, got = there.receive()
    sender.join()
    assert (gpu.launches, gpu.waits, gpu.bytes_up, gpu.bytes_down) == before
    found = unpack(got)["x"]
    assert found.device.type == "cuda" and torch.equal(found, x)
    assert gpu.bytes_up == before[2] + x.nbytes
    here.close()
    there.close()
