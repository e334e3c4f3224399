"""Shared by all tests. Its folder is on the path of tests and of the ranks they start, so both can import `layouts`."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Ranks share two cores; a test that wants more threads asks for them."""
    torch.set_num_threads(1)
