"""Figures are pyplot's in tests, which load it: no test leaves one to the next."""

from collections.abc import Iterator

import pytest
from matplotlib import pyplot


@pytest.fixture(autouse=True)
def no_figures() -> Iterator[None]:
    pyplot.close("all")
    yield
    pyplot.close("all")
