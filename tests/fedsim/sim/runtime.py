"""A Ray runtime for tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def local_runtime(num_cpus: int) -> Iterator[None]:
    """One of the caller's own, whatever else is running: executors use it and leave it running."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        import ray

        ray.init(
            address="local",
            num_cpus=num_cpus,
            num_gpus=0,
            include_dashboard=False,
            logging_level="error",
            log_to_driver=False,
            object_store_memory=200 << 20,
        )
        yield
        ray.shutdown()
