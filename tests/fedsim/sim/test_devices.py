"""Durations: download, work and upload; clocks of papers; traces with holes."""

from __future__ import annotations

from math import exp, inf
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedsim.sim.devices import (
    DEVICES,
    FX,
    Constant,
    Exponential,
    GilbertElliott,
    LogNormal,
    ShiftedExponential,
    Trace,
    Uniform,
)
from fedsim.streams import Streams

MADE: dict[str, Any] = {
    "constant": Constant(seconds_per_step=0.5, downlink=100.0, uplink=50.0),
    "f_x": FX(x=80, count=6, downlink=100.0, uplink=50.0),
    "uniform": Uniform(low=0.1, high=0.3, downlink=100.0, uplink=50.0),
    "lognormal": LogNormal(median=0.1, sigma=0.5, jitter=0.3, downlink=100.0, uplink=50.0),
    "exponential": Exponential(mean=2.0, x=50, count=6, downlink=100.0, uplink=50.0),
    "shifted_exponential": ShiftedExponential(count=6, mean=2.0, shift=0.5, downlink=100.0, uplink=50.0),
    "gilbert_elliott": GilbertElliott(seconds_per_step=0.1, to_slow=0.2, downlink=100.0, uplink=50.0),
}


def _jobs(devices: Any, jobs: int, n: int, down: float = 200, up: float = 300) -> Tensor:
    """[jobs, n] seconds of the first jobs of n clients, four steps each."""
    ids, index = torch.arange(n).repeat(jobs), torch.arange(jobs).repeat_interleave(n)
    full = [torch.full((jobs * n,), v, dtype=torch.float64) for v in (4.0, down, up)]
    return devices.seconds(Streams(0, ids, index), *full).view(jobs, n)


def _seconds(devices: Any, steps: float = 4, down: float = 200, up: float = 300, job: int = 0, n: int = 6) -> Tensor:
    ids = torch.arange(n)
    full = [torch.full((n,), v, dtype=torch.float64) for v in (steps, down, up)]
    return devices.seconds(Streams(0, ids, torch.full_like(ids, job)), *full)


def _of(ids: Tensor, job: int) -> Streams:
    return Streams(0, ids, torch.full_like(ids, job))


def test_bursts_have_their_share_and_length_and_a_job_needs_no_other() -> None:
    """A chain of two states: its share of slow jobs, the chance that a slow one follows another, and its lengths."""
    devices, ids = GilbertElliott(seconds_per_step=0.1, slowdown=5.0, to_slow=0.1, to_fast=0.3), torch.arange(5000)
    jobs = range(24)
    slow = torch.stack([devices.slow(_of(ids, job)) for job in jobs]).double()
    assert float(slow.mean()) == pytest.approx(0.25, abs=0.01) and float(slow[0].mean()) == pytest.approx(
        0.25, abs=0.03
    )
    follows = (slow[1:] * slow[:-1]).sum() / slow[:-1].sum()
    assert float(follows) == pytest.approx(0.7, abs=0.02)
    assert float((slow[2:] * slow[:-2]).sum() / slow[:-2].sum()) == pytest.approx(0.7**2 + 0.3 * 0.1, abs=0.02)
    assert torch.equal(devices.slow(_of(ids.flip(0), 9)).flip(0).double(), slow[9])
    assert float(devices.slow(_of(ids, -7)).double().mean()) == pytest.approx(0.25, abs=0.03)
    steps, bits = torch.full((5000,), 2.0).double(), torch.zeros(5000).double()
    seconds = devices.seconds(_of(ids, 3), steps, bits, bits)
    torch.testing.assert_close(seconds, 0.2 + 0.8 * slow[3], rtol=0, atol=1e-12)


def test_every_model_of_the_table_but_the_trace_is_tested_here() -> None:
    assert {*MADE, "trace"} == set(DEVICES)


@pytest.mark.parametrize("name", MADE)
def test_a_duration_is_download_plus_work_plus_upload(name: str) -> None:
    devices = MADE[name]
    whole, idle = _seconds(devices), _seconds(devices, down=0, up=0)
    scale = torch.tensor(1.0, dtype=torch.float64)
    if name == "lognormal":  # links slow down by the client's own factor
        scale = idle / (4 * 0.1)
    torch.testing.assert_close(whole, idle + scale * (200 / 100 + 300 / 50))


@pytest.mark.parametrize("name", MADE)
def test_a_message_without_steps_takes_no_work(name: str) -> None:
    torch.testing.assert_close(_seconds(MADE[name], steps=0, down=0, up=0), torch.zeros(6, dtype=torch.float64))


@pytest.mark.parametrize("name", MADE)
def test_times_depend_on_client_and_job_alone(name: str) -> None:
    devices = MADE[name]
    ids = torch.tensor([4, 1])
    one = torch.full((2,), 4.0, dtype=torch.float64)
    zero = torch.zeros(2, dtype=torch.float64)
    pair = devices.seconds(Streams(0, ids, torch.tensor([7, 3])), one, zero, zero)
    assert pair[0] == _seconds(devices, down=0, up=0, job=7)[4] and pair[1] == _seconds(devices, down=0, up=0, job=3)[1]
    varies = bool((_seconds(devices, job=0) != _seconds(devices, job=1)).any())
    assert varies is devices.random


def test_constant_speed_counts_steps() -> None:
    assert _seconds(Constant(seconds_per_step=0.5), steps=3).tolist() == [1.5] * 6


def test_f_x_clocks_are_evenly_spaced_and_do_not_count_steps() -> None:
    assert _seconds(FX(x=80, count=5), n=5).tolist() == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])
    assert _seconds(FX(x=80, count=5), n=5, steps=70).tolist() == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])
    assert _seconds(FX(x=0, count=5), n=5).tolist() == [1.0] * 5
    assert _seconds(FX(x=50, count=1, slowest=3.0), n=1).tolist() == [3.0]


def test_uniform_speeds_are_drawn_once_and_lie_between_the_bounds() -> None:
    drawn = _seconds(Uniform(low=0.1, high=0.3), steps=1, down=0, up=0, n=2000)
    assert 0.1 <= float(drawn.min()) < 0.101 and 0.299 < float(drawn.max()) <= 0.3
    assert float(drawn.mean()) == pytest.approx(0.2, abs=4 * 0.2 / 12**0.5 / 2000**0.5)


def test_lognormal_speeds_have_the_median_and_spread_asked_for() -> None:
    logs = _seconds(LogNormal(median=0.1, sigma=0.5), steps=1, down=0, up=0, n=4000).div(0.1).log()
    assert float(logs.mean()) == pytest.approx(0, abs=4 * 0.5 / 4000**0.5)
    assert float(logs.std()) == pytest.approx(0.5, rel=0.05)


def test_exponential_jobs_have_their_means_and_no_memory() -> None:
    devices = Exponential(mean=2.0, x=50, count=3)
    draws = _jobs(devices, 4000, n=3)
    assert draws.mean(0).tolist() == pytest.approx([2.0, 1.5, 1.0], rel=4 / 4000**0.5)
    late = (draws[:, 0] > 2.0).double()
    later = (draws[:, 0] > 4.0).double()
    assert float(late.mean()) == pytest.approx(exp(-1), abs=0.03)
    assert float(later.sum() / late.sum()) == pytest.approx(exp(-1), abs=0.05)


def test_a_shift_is_the_least_a_job_takes() -> None:
    draws = _jobs(MADE["shifted_exponential"], 400, n=6, down=0, up=0)
    assert 0.5 <= float(draws.min()) < 0.52


def test_a_shift_that_no_short_float_holds_is_in_the_law_to_the_last_digit() -> None:
    n = torch.zeros(6).double()
    least, rest = Exponential(mean=2.0, shift=0.3, count=6).law(_of(torch.arange(6), 0), n + 1, n, n)
    assert least.tolist() == [0.3] * 6 and rest.tolist() == [2.0] * 6


def test_a_trace_gives_every_client_its_own_speed_and_links(tmp_path: Path) -> None:
    path = tmp_path / "speeds.csv"
    path.write_text("client,seconds_per_step,downlink,uplink\n1,0.5,100,\n0,0.25,,50\n")
    trace = Trace(path=str(path), count=2)
    assert _seconds(trace, n=2).tolist() == pytest.approx([4 * 0.25 + 300 / 50, 4 * 0.5 + 200 / 100])


@pytest.mark.parametrize(
    "text, message",
    [
        ("client,seconds_per_step\n0,1\n2,1\n", r"no line for 1 of 3 clients \(1\)"),
        ("client,seconds_per_step\n0,1\n1,x\n2,1\n", "line 3: needs client and seconds_per_step"),
        ("client,seconds_per_step\n0,1\n5,1\n", "line 3: client 5 is not one of the 3"),
        ("client,seconds_per_step\n0,-1\n", "line 2: seconds must be 0 or more"),
        ("client,seconds_per_step,uplink\n0,1,0\n", "line 2: .*links positive"),
        ("id,time\n0,1\n", "line 2: needs client and seconds_per_step"),
        ("", "no line for 3 of 3 clients"),
    ],
)
def test_a_trace_with_holes_or_nonsense_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "speeds.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        Trace(path=str(path), count=3)


def test_a_missing_trace_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="can't be read"):
        Trace(path=str(tmp_path / "none.csv"), count=1)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Constant(seconds_per_step=-1.0),
        lambda: Constant(seconds_per_step=inf),
        lambda: Constant(uplink=0.0),
        lambda: Constant(downlink=-5.0),
        lambda: FX(x=100, count=3),
        lambda: FX(x=-1, count=3),
        lambda: Uniform(low=0.5, high=0.1),
        lambda: LogNormal(sigma=-1.0),
        lambda: LogNormal(jitter=-1.0),
        lambda: Exponential(count=3, shift=-1.0),
        lambda: Exponential(count=3, x=100.0),
    ],
)
def test_values_out_of_range_are_refused(make: Any) -> None:
    with pytest.raises(ValueError, match="must|high"):
        make()
