"""The suites over the tables make hundreds of runs on one data set."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fedsim.data.sources import kept


@pytest.fixture(autouse=True, scope="package")
def _one_reading_of_the_data() -> Iterator[None]:
    with kept():
        yield
