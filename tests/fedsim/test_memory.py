"""Client memory: zeros first, rows by client, and only for those that wrote."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fedsim.checkpoint import load, save
from fedsim.config import ConfigError
from fedsim.memory import BLOCK_BYTES, Memory, MemoryRows
from fedsim.parts import Parts
from fedsim.stores import InTensor


@pytest.mark.parametrize("on_disk", [False, True])
def test_rows_are_kept_by_client_and_start_at_zero(on_disk: bool, tmp_path: Path) -> None:
    memory = Memory(1_000_000, tmp_path / "rows" if on_disk else None)
    memory.write(torch.tensor([999_999, 3]), {"c": torch.tensor([[1.0, 2.0], [3.0, 4.0]])})
    assert memory.of(torch.tensor([3, 5, 999_999]))["c"].tolist() == [[3.0, 4.0], [0.0, 0.0], [1.0, 2.0]]
    memory.write(torch.arange(10), {"c": torch.arange(20.0).view(10, 2)})
    assert memory.of(torch.tensor([9, 999_999]))["c"].tolist() == [[18.0, 19.0], [1.0, 2.0]]


def test_rows_in_ram_stay_where_they_are_as_more_clients_write() -> None:
    memory = Memory(1_000_000)  # 400 GB if every client wrote
    ids = torch.randperm(1_000_000)[:6]
    memory.write(ids[:2], {"c": torch.arange(2.0)[:, None].expand(2, 100_000)})
    store = memory.tables["c"].store
    assert isinstance(store, InTensor)
    start = store._rows.data_ptr()
    memory.write(ids[2:5], {"c": torch.arange(2.0, 5.0)[:, None].expand(3, 100_000)})
    assert store._rows.data_ptr() == start
    assert memory.of(ids)["c"][:, -1].tolist() == [0, 1, 2, 3, 4, 0]


def test_a_file_of_rows_takes_the_room_of_those_that_were_written(tmp_path: Path) -> None:
    memory = Memory(1_000_000, tmp_path / "rows")
    ids = torch.randperm(1_000_000)[:6]
    memory.write(ids[:4], {"c": torch.arange(4.0)[:, None].expand(4, 100_000)})
    memory.write(ids[[5, 1, 2, 4]], {"c": torch.arange(5.0, 9.0)[:, None].expand(4, 100_000)})
    assert memory.of(ids)["c"][:, -1].tolist() == [0, 6, 7, 3, 8, 5]
    assert (tmp_path / "rows" / "c.rows").stat().st_size == 6 * 400_000


def test_a_disk_that_takes_no_more_is_one_message_and_no_signal(tmp_path: Path) -> None:
    script = """
import resource, sys
from pathlib import Path
import torch
from fedsim.memory import Memory
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
memory = Memory(100, Path(sys.argv[1]))
try:
    for client in range(0, 100, 2):
        memory.write(torch.tensor([client, client + 1]), {"c/1": torch.ones(2, 1000)})
except ValueError as e:
    print(client, e)
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # 25 rows of 4,000 bytes fit, and half of the thirteenth pair is written before there is no more room
    assert done.stdout.startswith("24 runtime.memory: disk can't keep rows in ") and "c_1.rows" in done.stdout
    assert "File too large" in done.stdout and "--resume" in done.stdout


def test_a_file_that_cannot_be_made_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "rows").write_text("no folder")
    with pytest.raises(ConfigError, match=r"disk can't keep rows in .*c.rows: .*make room, or set runtime.memory=ram"):
        Memory(9, tmp_path / "rows").write(torch.tensor([7]), {"c": torch.ones(1, 2)})


def test_a_copy_read_is_not_the_store() -> None:
    memory = Memory(4)
    memory.write(torch.tensor([1]), {"c": torch.ones(1, 2)})
    memory.of(torch.tensor([1]))["c"][:] = 9
    assert memory.of(torch.tensor([1]))["c"].tolist() == [[1.0, 1.0]]


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
    rows = memory.of(torch.tensor([5, 6, 7]))
    assert rows["c"].tolist() == [[2.0], [0.0], [1.0]] and rows["d"].tolist() == [[0.0], [3.0], [0.0]]


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_checkpoint_restores_every_name_and_shape(on_disk: bool, tmp_path: Path) -> None:
    memory = Memory(600, tmp_path / "one" if on_disk else None)
    memory.write(torch.tensor([4, 2]), {"c": torch.rand(2, 3), "t": torch.tensor([7, 9])})
    memory.write(torch.randperm(600)[:500], {"d": torch.rand(500, 1000).to(torch.bfloat16)})
    other = Memory(600, tmp_path / "other" if on_disk else None)
    other.load(load(save(tmp_path, 1, {"memory": memory.state()})).take("memory"))
    ids = torch.arange(600)
    for name in ("c", "t", "d"):
        assert torch.equal(other.of(ids)[name], memory.of(ids)[name])
        assert other.of(ids)[name].dtype == memory.of(ids)[name].dtype
    assert other.tables["d"].owners == memory.tables["d"].owners


def test_a_checkpoint_writes_the_blocks_whose_rows_were_written(tmp_path: Path) -> None:
    memory, rows = Memory(9), BLOCK_BYTES // 4 // 2  # two rows to a block
    memory.write(torch.arange(9), {"c": torch.arange(9.0)[:, None].expand(9, rows), "t": torch.arange(9)})
    save(tmp_path, 1, {"memory": memory.state()})
    before = {p.name for p in (tmp_path / "rows").iterdir()}
    assert len(before) == 5 + 1
    memory.write(torch.tensor([3, 8, 2]), {"c": torch.zeros(3, rows)})
    path = save(tmp_path, 2, {"memory": memory.state()})
    assert len({p.name for p in (tmp_path / "rows").iterdir()} - before) == 2  # of clients 2 and 3, and of client 8
    other = Memory(9)
    other.load(load(path).take("memory"))
    assert other.of(torch.arange(9))["c"][:, 0].tolist() == [0, 1, 0, 0, 4, 5, 6, 7, 0]
    save(tmp_path, 3, {"memory": other.state()})
    save(tmp_path, 4, {"memory": other.state()})
    assert len(list((tmp_path / "rows").iterdir())) == 6
    other.write(torch.tensor([3]), {"c": torch.ones(1, rows)})
    again = Memory(9)
    again.load(load(save(tmp_path, 5, {"memory": other.state()})).take("memory"))
    assert again.of(torch.arange(9))["c"][:, 0].tolist() == [0, 1, 0, 1, 4, 5, 6, 7, 0]


def test_memory_on_disk_takes_the_room_of_a_call() -> None:
    script = """
import sys, tempfile
from pathlib import Path
import torch
from fedsim.checkpoint import load, save
from fedsim.memory import Memory

def megabytes(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) / 1024

with tempfile.TemporaryDirectory() as folder:
    for num_clients, size in ((4, 8), (48, 2**18)):  # first a small one, for what is loaded late
        root = Path(folder) / str(size)
        before = megabytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        memory, other = Memory(num_clients, root / "one"), Memory(num_clients, root / "other")
        for ids in torch.arange(num_clients).split(4):
            memory.write(ids, {"c": memory.of(ids)["c"] + 1 if "c" in memory.tables else torch.ones(len(ids), size)})
        other.load(load(save(root / "checkpoints", 1, {"memory": memory.state()})).take("memory"))
        assert float(sum(other.of(torch.tensor([i]))["c"].sum() for i in range(num_clients))) == num_clients * size
print(megabytes("VmHWM") - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 20  # MiB, where the rows take 48


def test_a_stack_sees_what_it_wrote_and_keeps_the_store_untouched() -> None:
    stored = {"c": torch.ones(2, 3)}
    rows = MemoryRows(stored, 2, 3, torch.device("cpu"))
    assert rows["m"].tolist() == [[0.0] * 3] * 2
    rows["c"] = rows["c"] + 1
    assert rows["c"].tolist() == [[2.0] * 3] * 2
    assert stored["c"].tolist() == [[1.0] * 3] * 2
    with pytest.raises(ValueError, match="one row per client"):
        rows["c"] = torch.ones(3, 3)
