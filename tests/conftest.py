"""What holds for all tests: no time limits on single examples, and one Ray runtime at a time."""

from __future__ import annotations

import pytest
from hypothesis import settings

settings.register_profile("fedsim", deadline=None)
settings.load_profile("fedsim")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("ray") is not None:
            item.add_marker(pytest.mark.xdist_group("ray"))
