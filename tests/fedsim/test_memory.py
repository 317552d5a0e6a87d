"""Client memory: zeros first, rows by client, and only for those that wrote."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from fedsim.memory import Memory, MemoryRows
from fedsim.parts import Parts


@pytest.mark.parametrize("on_disk", [False, True])
def test_rows_are_kept_by_client_and_start_at_zero(on_disk: bool, tmp_path: Path) -> None:
    memory = Memory(1_000_000, tmp_path / "rows" if on_disk else None)
    memory.write(torch.tensor([999_999, 3]), {"c": torch.tensor([[1.0, 2.0], [3.0, 4.0]])})
    assert memory.read(torch.tensor([3, 5, 999_999]))["c"].tolist() == [[3.0, 4.0], [0.0, 0.0], [1.0, 2.0]]
    memory.write(torch.arange(10), {"c": torch.arange(20.0).view(10, 2)})
    assert memory.read(torch.tensor([9, 999_999]))["c"].tolist() == [[18.0, 19.0], [1.0, 2.0]]
    assert memory.mean("c", 2).tolist() == pytest.approx([(90.0 + 1) / 1e6, (100.0 + 2) / 1e6])


def test_a_copy_read_is_not_the_store() -> None:
    memory = Memory(4)
    memory.write(torch.tensor([1]), {"c": torch.ones(1, 2)})
    memory.read(torch.tensor([1]))["c"][:] = 9
    assert memory.read(torch.tensor([1]))["c"].tolist() == [[1.0, 1.0]]


def test_rows_are_read_when_they_are_needed_and_travel_as_copies() -> None:
    memory = Memory(5)
    kept = memory.of(torch.tensor([3, 1])).rows(torch.tensor([1]))
    assert "c" not in kept and len(kept) == 0
    memory.write(torch.tensor([1]), {"c": torch.ones(1, 2)})
    sent = pickle.loads(pickle.dumps(kept))
    memory.write(torch.tensor([1]), {"c": torch.full((1, 2), 7.0)})
    assert list(kept) == ["c"] and kept["c"].tolist() == [[7.0, 7.0]]
    assert type(sent) is dict and sent["c"].tolist() == [[1.0, 1.0]]


def test_parts_are_written_only_for_the_clients_that_gave_them() -> None:
    parts = Parts(3)
    parts.add(torch.tensor([2, 0]), {"c": torch.tensor([[1.0], [2.0]])})
    parts.add(torch.tensor([1]), {"d": torch.tensor([[3.0]])})
    memory = Memory(9)
    memory.write(torch.tensor([5, 6, 7]), parts)
    rows = memory.read(torch.tensor([5, 6, 7]))
    assert rows["c"].tolist() == [[2.0], [0.0], [1.0]] and rows["d"].tolist() == [[0.0], [3.0], [0.0]]
    assert memory.mean("d", 1).tolist() == pytest.approx([3 / 9])


def test_state_restores_every_name_and_shape() -> None:
    memory = Memory(6)
    memory.write(torch.tensor([4, 2]), {"c": torch.rand(2, 3), "t": torch.tensor([7, 9])})
    other = Memory(6)
    other.load(memory.state())
    ids = torch.arange(6)
    for name in ("c", "t"):
        assert torch.equal(other.read(ids)[name], memory.read(ids)[name])
        assert other.read(ids)[name].dtype == memory.read(ids)[name].dtype


def test_a_stack_sees_what_it_wrote_and_keeps_the_store_untouched() -> None:
    stored = {"c": torch.ones(2, 3)}
    rows = MemoryRows(stored, 2, 3, torch.device("cpu"))
    assert rows["m"].tolist() == [[0.0] * 3] * 2
    rows["c"] = rows["c"] + 1
    assert rows["c"].tolist() == [[2.0] * 3] * 2
    assert stored["c"].tolist() == [[1.0] * 3] * 2
    with pytest.raises(ValueError, match="one row per client"):
        rows["c"] = torch.ones(3, 3)
