"""What holds for all tests: no time limits on single examples, which a busy machine would break; shared fixtures."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import settings

settings.register_profile("fedsim", deadline=None)
settings.load_profile("fedsim")


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of intra-op threads, for this test alone."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
