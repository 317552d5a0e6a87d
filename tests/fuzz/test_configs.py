"""Experiment files with something wrong in them: a plan, or one message and exit code 2."""

from __future__ import annotations

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from numpy.random import default_rng

from tests.fedsim.console import fedsim as console
from tests.fuzz.amount import cases
from tests.fuzz.configs import mutated, shipped, text_of

SECONDS = 120
ROOM = 2 << 30  # bytes that a check may allocate: far above what any of these plans declares


@contextmanager
def bounded() -> Iterator[None]:
    """A limit of time and of memory."""

    def ring(*_: object) -> None:
        raise TimeoutError(f"no answer for {SECONDS} seconds")

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, ring)
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, hard))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.filterwarnings("default")
@pytest.mark.timeout(3600)
def test_a_spoiled_experiment_file_is_planned_or_refused_in_a_message(tmp_path: Path) -> None:
    path, codes, configs = tmp_path / "spoiled.yaml", [], shipped()
    for case in range(cases(8, 1000)):
        path.write_text(text_of(mutated(configs, default_rng([5, case]))))
        with bounded():
            found = console("check", path)
        codes.append(found.code)
        *before, said = found.err.splitlines() or [""]
        assert found.code == 0 or (found.code == 2 and said), (case, found)
        assert "Traceback" not in found.err and len(before) <= 3, (case, found.err)
    assert 2 in codes
