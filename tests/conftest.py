"""Shared by all tests. Its folder is on the path of tests and of the ranks they start, so both can import `layouts`."""

from collections.abc import Iterator

import pytest
import torch

from megascratch.dist.testing import RankPool


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    """Processes that all tests share which run many layouts: starting eight takes seconds."""
    with RankPool() as pool:
        yield pool


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Ranks share two cores; a test that wants more threads asks for them."""
    torch.set_num_threads(1)
