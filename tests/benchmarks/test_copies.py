"""How many copies of the model a round holds: the counter on what can be counted by hand, and budgets of rounds."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from benchmarks.copies import CASES, SMALL, Live, config, play, storages

BUDGETS = {
    "FedAvg in factors": 5.0,
    "FedAvg in steps": 7.0,
    "FedAvg, momentum": 8.2,
    "FedAvg, AdamW": 9.2,
    "FedAvg, server's Adam": 9.0,
    "SCAFFOLD in factors": 15.1,
    "SCAFFOLD-M in factors": 18.1,
    "FedBuff, c = 2": 9.0,
    "FedBuff, streaming, c = 2": 11.0,
    "MoNNA": 22.0,  # of them 12 in float64 for distances, whose pieces are cut for larger models
}
"""{case: copies}; each is made up of what `benchmarks.copies --holders` lists."""


def test_the_counter_sees_what_is_alive_at_once_on_all_threads() -> None:
    kept = torch.ones(100)  # there before
    live = Live(400, storages())

    def elsewhere() -> Tensor:
        with live.counting():
            return torch.ones(200) + torch.ones(200)  # three of them at once, of which one stays

    with live.counting(), ThreadPoolExecutor(1) as pool:
        a = torch.ones(100)
        a[1:].add_(kept[1:])  # views and what lay there before add nothing
        assert live.peak == 400
        b = pool.submit(elsewhere).result()
        assert live.peak == 400 + 3 * 800
        del a
        c = b + 1
        assert live.peak == 400 + 3 * 800 and len(c) == 200
        del b, c
        torch.ones(10)  # too small to count
        d = torch.ones(1000)
    assert live.peak == 4000 == d.nbytes and set(live.holders.values()) == {4000}


@pytest.mark.parametrize("case", CASES)
def test_a_round_keeps_within_its_copies(case: str) -> None:
    peak, holders = play(config(case, SMALL, shape=(1, 8, 8)), rounds=2)
    assert peak < BUDGETS[case] + 0.2, holders
    # nobody can do without the model, a vector of a client's and a sum
    assert peak > 3
