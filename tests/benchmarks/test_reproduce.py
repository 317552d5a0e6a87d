"""What reproductions bring along."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.reproduce.coding import Bursty
from benchmarks.reproduce.momentum import PROBLEMS, check_complete
from fedsim.streams import Streams
from fedsim.sweep import Results


def test_bursts_follow_the_two_state_chain() -> None:
    """Shares and transitions within four standard errors; a state is the same whenever it is asked for."""
    n, jobs, enter, leave = 4000, 6, 0.1, 0.6
    workers, devices = torch.arange(n), Bursty(count=n, enter=enter, leave=leave)
    slow = torch.stack([devices.slow(Streams(3, workers, torch.full((n,), k))) for k in range(jobs)])
    share = enter / (enter + leave)
    for states in slow:
        assert float(states.double().mean()) == pytest.approx(share, abs=4 * (share * (1 - share) / n) ** 0.5)
    before, after = slow[:-1].flatten(), slow[1:].flatten().double()
    for chance, where in ((enter, ~before), (1 - leave, before)):
        error = (chance * (1 - chance) / int(where.sum())) ** 0.5
        assert float(after[where].mean()) == pytest.approx(chance, abs=4 * error)
    some = torch.tensor([7, 5, 3999])
    assert torch.equal(devices.slow(Streams(3, some, torch.tensor([2, 5, 0]))), slow[[2, 5, 0], some])


def test_a_method_without_a_complete_rate_is_named(tmp_path: Path) -> None:
    nothing = Results(tmp_path, [], [], "test_accuracy", False, 3)
    with pytest.raises(SystemExit, match=r"all of 10 clients, Dirichlet 0.1: no rate of FedAvg came .*sweep.csv"):
        check_complete(PROBLEMS[0], nothing)


def test_a_job_takes_longer_by_its_load() -> None:
    devices, streams = Bursty(count=8), Streams(0, torch.arange(8), torch.zeros(8, dtype=torch.int64))
    none = torch.zeros(8)
    more = devices.seconds(streams, none + 3, none, none) - devices.seconds(streams, none + 1, none, none)
    assert more.tolist() == pytest.approx([2.2013 * 2 / 8] * 8)
