"""Every strategy of the table gives the same metrics on Ray as in process, whatever the number of workers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from fedsim.composition import pair
from fedsim.runs import run
from strategies import STRATEGIES

pytestmark = [
    pytest.mark.ray,
    pytest.mark.alone,
    # Ray leaves log files and child processes to the interpreter's end
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def runtime() -> Iterator[None]:
    """One runtime for the whole table."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        import ray

        ray.init(
            address="local",
            num_cpus=3,
            num_gpus=0,
            include_dashboard=False,
            logging_level="error",
            log_to_driver=False,
            object_store_memory=150 << 20,
        )
        yield
        ray.shutdown()


def _rows(strategy: str, **overrides: Any) -> list[dict[str, Any]]:
    history = run({**pair(strategy, None), "runtime": {"stack": 3}}, **overrides)
    return [{k: v for k, v in row.items() if k != "wall_seconds"} for row in history.rows]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_metrics_on_ray_equal_those_in_process(strategy: str, runtime: None) -> None:
    workers = 1 + list(STRATEGIES).index(strategy) % 3  # one, two and three take turns over the table
    there = _rows(strategy, **{"runtime.executor": "ray", "runtime.workers": workers})
    assert there == _rows(strategy)
