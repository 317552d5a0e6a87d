"""What holds for all tests: no time limits on single examples, which a busy machine would break; shared fixtures."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import settings

from fedsim.files import write_whole

# Two processes whose threads wait for each other by spinning take twice the time of two with one thread each.
os.environ["OMP_NUM_THREADS"] = "1"  # in processes that tests start, xdist's among them
torch.set_num_threads(1)

settings.register_profile("fedsim", deadline=None)
settings.load_profile("fedsim")


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of intra-op threads, for this test alone."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _plain_reports(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs draw no pictures, which take longer than they do, but for tests marked `pictures`."""
    if request.node.get_closest_marker("pictures") is None:
        monkeypatch.setattr("fedsim.results._write_report", lambda folder: write_whole(folder / "report.html", "drawn"))
