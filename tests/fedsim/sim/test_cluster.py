"""A cluster of several nodes: three raylets on this machine, one of which is lost in mid-round."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from fedsim.sim.in_process import InProcess
from fedsim.sim.ray_executor import RayExecutor
from tests.fedsim.sim.ray_cases import arm, assert_same_bits, once_marked, runner, some_jobs

pytestmark = [
    pytest.mark.ray,
    # Ray leaves log files and child processes to the interpreter's end
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]

STORE = 100 << 20  # bytes of each node's object store


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head without CPUs, so that every worker sits on one of two other nodes.

    The cluster notices a death within 2 s, since nobody answers at all; a node that lives may take 10 s to answer.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        import ray
        from ray.cluster_utils import Cluster

        quick = {
            "health_check_initial_delay_ms": 0,
            "health_check_period_ms": 500,
            "health_check_timeout_ms": 10_000,
            "health_check_failure_threshold": 4,
        }
        head = {"num_cpus": 0, "object_store_memory": STORE, "include_dashboard": False, "_system_config": quick}
        made = Cluster(initialize_head=True, head_node_args=head)
        made.nodes = [made.add_node(num_cpus=1, object_store_memory=STORE) for _ in range(2)]
        yield made
        ray.shutdown()
        made.shutdown()


def node_of(cluster: Any, pid: int) -> Any:
    """The node whose raylet started a worker process."""
    parents = {p.pid for p in psutil.Process(pid).parents()}
    return next(n for n in cluster.nodes if n.all_processes["raylet"][0].process.pid in parents)


def wait_for_nodes(count: int, seconds: float = 60.0) -> None:
    """Until the cluster counts so many nodes as alive."""
    import ray

    until = time.monotonic() + seconds
    while (alive := sum(n["Alive"] for n in ray.nodes())) != count:
        assert time.monotonic() < until, f"{alive} nodes are alive, not {count}"
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("collectives", "told"),
    [
        pytest.param("object_store", "a worker was lost", marks=pytest.mark.alone),  # test_ray_executor kills a worker
        ("auto", "the workers' group is dissolved"),  # auto is gloo between nodes
    ],
)
def test_a_node_lost_in_mid_round_changes_no_bit(
    cluster: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, collectives: Any, told: str
) -> None:
    import ray

    executor = RayExecutor(runner(tmp_path), width=8, address=cluster.address, collectives=collectives)
    assert executor.num_workers == 2, "one worker for each CPU of the cluster"
    here = InProcess(runner(), width=8)

    def lose(pid: int) -> None:
        cluster.nodes.remove(lost := node_of(cluster, pid))
        cluster.remove_node(lost, allow_graceful=False)

    loss = once_marked(arm(tmp_path), lose)
    with caplog.at_level(logging.WARNING, logger="fedsim"):
        got = executor.run(some_jobs())
    loss.join(60)
    assert_same_bits(got, here.run(some_jobs()))
    assert told in caplog.text
    wait_for_nodes(2)  # the executor sees a broken connection before the cluster misses the node

    later = some_jobs(fold=False, num_models=2, round=5)
    assert_same_bits(executor.run(later), here.run(later))  # on the node that is left
    cluster.nodes.append(cluster.add_node(num_cpus=1, object_store_memory=STORE))
    assert_same_bits(executor.run(later), here.run(later))  # and on whichever joins

    executor.close()
    here.close()
    assert not ray.is_initialized(), "it left the cluster that it had joined"
