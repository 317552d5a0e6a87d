"""Availability from files: the two kinds of columns, repetition, and files with mistakes."""

from __future__ import annotations

from math import inf
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from fedsim.sim.absence import Absence
from fedsim.sim.traces import Trace, trace

IDS = torch.arange(3)
ROWS = "client,active,inactive\n0,0,10\n1,5,7\n0,20,30\n1,7,9\n2,1,2\n"


def _written(folder: Path, text: str) -> str:
    (folder / "trace.csv").write_text(text)
    return str(folder / "trace.csv")


def _on(of: Trace, *times: float) -> list[list[int]]:
    return [of.on_line(0, IDS, t).int().tolist() for t in times]


def test_clients_are_on_line_in_their_intervals_and_never_after_the_last(tmp_path: Path) -> None:
    of = trace(path=_written(tmp_path, ROWS), count=3)
    assert _on(of, 0.0, 1.0, 5.0, 7.0, 9.0, 10.0, 20.0, 30.0, 1e9) == [
        *([1, 0, 0], [1, 0, 1], [1, 1, 0], [1, 1, 0], [1, 0, 0], [0, 0, 0], [1, 0, 0], [0, 0, 0], [0, 0, 0])
    ]
    assert of.changes(0, IDS, 0.0, inf).tolist() == [10.0, 5.0, 1.0]
    assert of.changes(0, IDS, 6.0, inf).tolist() == [10.0, 9.0, inf], "two intervals that touch are one"
    assert of.changes(0, IDS, 12.0, inf).tolist() == [20.0, inf, inf]
    with pytest.raises(ValueError, match="1 of 3 clients are needed at once from second 40 on.*nobody comes any more"):
        Absence(availability=of).wait(IDS, 40.0, 1)


def test_a_trace_with_a_finish_time_begins_again(tmp_path: Path) -> None:
    rows = "client_id,active,inactive,finish_time\n0,0,2,10\n0,8,10,10\n1,1,4,5\n2,0,6,6\n"
    of = trace(path=_written(tmp_path, rows), count=3)
    assert _on(of, 1.0, 3.0, 9.0, 11.0, 12.0, 108.0) == [
        *([1, 1, 1], [0, 1, 1], [1, 0, 1], [1, 1, 1], [0, 1, 1], [1, 1, 1])
    ]
    assert of.changes(0, IDS, 9.0, inf).tolist() == [12.0, 11.0, inf], "on line over the end, coming again, for ever"
    assert of.changes(0, IDS, 103.0, inf).tolist() == [108.0, 104.0, inf]


def test_a_period_of_the_file_or_of_the_settings(tmp_path: Path) -> None:
    path = _written(tmp_path, ROWS)
    assert _on(trace(path=path, count=3, period=40.0), 45.0) == [[1, 1, 0]]
    with pytest.raises(ValueError, match="client 0 is on line until 30, after its trace begins again at 25"):
        trace(path=path, count=3, period=25.0)


def test_lists_in_parquet_are_read_as_rows_are(tmp_path: Path) -> None:
    columns = {"client": [0, 1, 2], "active": [[0, 20], [5, 7], [1]], "inactive": [[10, 30], [7, 9], [2]]}
    pq.write_table(pa.table(columns), tmp_path / "trace.parquet")
    lists, rows = trace(path=str(tmp_path / "trace.parquet"), count=3), trace(path=_written(tmp_path, ROWS), count=3)
    assert torch.equal(lists.starts, rows.starts) and torch.equal(lists.ends, rows.ends)
    assert torch.equal(lists.first, rows.first)


def test_a_ping_stands_for_its_quarter_of_a_minute(tmp_path: Path) -> None:
    of = trace(path=_written(tmp_path, "id,timestamp\n0,1000\n1,1016\n0,1021\n1,1017\n2,1030\n0,1060\n"), count=3)
    assert _on(of, 0.0, 15.0, 29.0, 30.0, 60.0, 75.0) == [
        *([1, 0, 0], [1, 1, 0], [1, 1, 0], [0, 0, 1], [1, 0, 0], [0, 0, 0])
    ]
    assert of.changes(0, IDS, 0.0, inf).tolist() == [30.0, 15.0, 30.0]


@pytest.mark.parametrize(
    "text, words",
    [
        ("client,active,inactive\n0,0,1\n2,0,1\n", r"no interval for 1 of 3 clients \(1\); add them or lower"),
        (ROWS + "3,0,1\n", r"client 3 is not one of the 3 clients 0\.\.2; number the file's clients from 0"),
        (ROWS.replace("2,1,2", "2,1,2\n2,0,1"), "client 2: 0 comes after an interval that ends at 2; sort"),
        (ROWS.replace("1,7,9", "1,6,9"), "client 1: 6 comes after an interval that ends at 7"),
        (ROWS.replace("2,1,2", "2,2,1"), "client 2 is on line from 2 to 1; times are seconds"),
        (ROWS.replace("2,1,2", "2,1,"), "column inactive has 1 missing values"),
        (ROWS.replace("2,1,2", "2,1,late"), "column inactive must hold finite numbers"),
        ("client,start,end\n0,0,1\n", "has the columns client, start, end; needs client, active, inactive, or"),
        ("client,active,inactive\n", "has no rows"),
        ("client,active,inactive,finish_time\n0,0,1,9\n0,2,3,8\n1,0,1,9\n2,0,1,9\n", "several values of finish_time"),
    ],
)
def test_a_trace_with_a_mistake_is_refused_by_name(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"path .*trace\.csv: .*" + words):
        trace(path=_written(tmp_path, text), count=3)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"client": [0, 7]}, "client 7 is not one of the 2 clients"),
        ({"client": [[0], [1]]}, "column client must hold finite numbers"),
        ({"finish_time": [[5.0], [5.0]]}, "column finish_time must hold finite numbers"),
        ({"active": [["now"], []]}, "column active must hold lists of numbers"),
    ],
)
def test_lists_with_a_mistake_are_refused_by_name(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    columns = {"client": [0, 1], "active": [[0.0], []], "inactive": [[1.0], []], "finish_time": [5.0, 5.0], **changes}
    pq.write_table(pa.table(columns), tmp_path / "trace.parquet")
    with pytest.raises(ValueError, match=words):
        trace(path=str(tmp_path / "trace.parquet"), count=2)


def test_a_trace_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere.csv: can't be read"):
        trace(path=str(tmp_path / "nowhere.csv"), count=3)
