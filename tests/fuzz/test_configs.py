"""Experiment files with something wrong in them: a plan, or one message and exit code 2."""

from __future__ import annotations

import mmap
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
ROOM = 2 << 30  # bytes of address space that a check may ask for, so that none can harm the machine
RESIDENT = 210 << 20  # and bytes that it may touch: twice what the largest of the undamaged files takes, read first


@contextmanager
def bounded() -> Iterator[None]:
    """A limit of time and of memory, the latter as the kernel has counted it: its peak since the block began."""

    def ring(*_: object) -> None:
        raise TimeoutError(f"no answer for {SECONDS} seconds")

    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    used, resident = bytes_of("VmSize"), bytes_of("VmRSS")
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
    assert bytes_of("VmHWM") - resident <= RESIDENT


def bytes_of(name: str) -> int:
    """What the kernel says of this process's memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))


def test_the_limit_of_memory_sees_a_peak_that_is_over() -> None:
    size = RESIDENT + (8 << 20)
    with pytest.raises(AssertionError), bounded(), mmap.mmap(-1, size) as fresh:  # none that the process has left over
        fresh[:: mmap.PAGESIZE] = bytes(size // mmap.PAGESIZE)


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
