"""Benchmarks that build entries of our tables still can, on sizes that take no time."""

import pytest

from benchmarks import bench_aggregate
from fedsim.aggregate import AGGREGATORS


def test_every_aggregator_can_be_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--rows", "10", "--entries", "20", "--repeats", "1"]
    monkeypatch.setattr("sys.argv", ["bench_aggregate", *sizes, "--rules", *AGGREGATORS])
    bench_aggregate.main()
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:-1]] == [*AGGREGATORS]
