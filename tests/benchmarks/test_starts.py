"""Benchmarks find what they import, and those that build entries of our tables still can, on small sizes."""

import pkgutil
from importlib import import_module

import pytest

import benchmarks
from benchmarks import bench_aggregate
from fedsim.aggregate import AGGREGATORS


@pytest.mark.parametrize("name", [module.name for module in pkgutil.iter_modules(benchmarks.__path__)])
def test_every_benchmark_finds_what_it_imports(name: str) -> None:
    assert import_module(f"benchmarks.{name}").__doc__, "it says what it measures and how it is called"


def test_every_aggregator_can_be_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--rows", "10", "--entries", "20", "--repeats", "1"]
    monkeypatch.setattr("sys.argv", ["bench_aggregate", *sizes, "--rules", *AGGREGATORS])
    bench_aggregate.main()
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:-1]] == [*AGGREGATORS]
