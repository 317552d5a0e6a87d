"""What reproductions bring along."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.reproduce import data
from benchmarks.reproduce.coding import Bursty
from benchmarks.reproduce.data import evenly, loudest_speakers
from fedsim.data.arrays import from_arrays
from fedsim.data.text import FILE
from fedsim.streams import Streams


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


def test_a_job_takes_longer_by_its_load() -> None:
    devices, streams = Bursty(count=8), Streams(0, torch.arange(8), torch.zeros(8, dtype=torch.int64))
    none = torch.zeros(8)
    more = devices.seconds(streams, none + 3, none, none) - devices.seconds(streams, none + 1, none, none)
    assert more.tolist() == pytest.approx([2.2013 * 2 / 8] * 8)


def test_the_loudest_speakers_are_clients_and_their_last_characters_the_context(tmp_path: Path) -> None:
    blocks = {"LOUD": "abc" * 12, "LOUDER": "cba" * 13, "QUIET": "abc"}
    (tmp_path / FILE).write_text("\n\n".join(f"{name}:\n{said}" for name, said in blocks.items()))
    plays = loudest_speakers(2, each=3, test=1, context=3, root=str(tmp_path))
    assert plays.group_names == ("LOUDER", "LOUD") and plays.groups is not None
    assert plays.groups.tolist() == [0, 0, 0, 1, 1, 1] and len(plays.test_targets) == 1
    letters = plays.class_names
    for row, target in zip(plays.inputs, plays.targets, strict=True):
        places = row.reshape(3, len(letters))
        assert places.sum(1).tolist() == [1.0] * 3
        told = "".join(letters[i] for i in places.argmax(1).tolist())
        assert told in ("abc", "cba") and letters[int(target)] == told[0]  # both repeat after three


def test_clothes_are_cut_and_their_pixels_pooled(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.arange(3 * 16.0).reshape(3, 1, 4, 4)
    whole = from_arrays(images, torch.arange(3), images + 1, torch.arange(3), num_classes=3, origin="made up")
    monkeypatch.setattr(data, "fashion_mnist", lambda root: whole)
    some = data.some_clothes(2, 1, pool=2)
    assert isinstance(some.inputs, torch.Tensor) and isinstance(some.test_inputs, torch.Tensor)
    assert some.inputs[0, 0].tolist() == [[2.5, 4.5], [10.5, 12.5]] and some.inputs.shape == (2, 1, 2, 2)
    assert some.test_inputs[0, 0].tolist() == [[3.5, 5.5], [11.5, 13.5]] and some.test_targets is not None
    assert some.targets.tolist() == [0, 1] and some.test_targets.tolist() == [0]


def test_rows_are_taken_evenly() -> None:
    assert evenly(torch.arange(9), 3).tolist() == [0, 4, 8] and evenly(torch.arange(2), 5).tolist() == [0, 1]
