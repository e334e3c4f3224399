"""Fixtures of the checkpoint tests. Puts its folder on the path, for `ranks_and_models`."""

import sys
from pathlib import Path

import pytest
from rich.console import Console
from torch import Tensor

from megascratch.config import Config

sys.path.insert(0, str(Path(__file__).parent))

from ranks_and_models import logical_tensors, tiny_config, write_checkpoint


@pytest.fixture
def console() -> Console:
    return Console(quiet=True)


@pytest.fixture
def tiny(tmp_path: Path) -> tuple[Path, Config, dict[str, Tensor]]:
    """A checkpoint, its configuration and its tensors."""
    config = tiny_config()
    values = logical_tensors(config)
    return write_checkpoint(tmp_path / "run", config, values), config, values
