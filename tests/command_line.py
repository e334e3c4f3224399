"""Running a verb inside the test's process, and what the command-line tests share."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from megascratch.cli import main


@dataclass(frozen=True)
class Finished:
    """How a verb ended."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Files:
    """A corpus, the tokenizer trained on it, and the dataset made of both."""

    corpus: Path
    tokenizer: Path
    dataset: Path


Run = Callable[..., Finished]


def exit_code(*arguments: object) -> int:
    """Run a verb and return its exit code."""
    with pytest.raises(SystemExit) as exit:
        main([str(argument) for argument in arguments])
    assert isinstance(exit.value.code, int)
    return exit.value.code
