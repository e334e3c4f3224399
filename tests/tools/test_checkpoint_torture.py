"""The scripts that damage checkpoints and kill runs, with a few of their thousands of trials."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

TOOLS = Path(__file__).parents[2] / "tools"


def tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_no_mutation_is_silent() -> None:
    assert tool("mutate_checkpoint").silent(300, seed=7) == []


def test_a_killed_run_goes_on_to_the_same_bits() -> None:
    """Trials 0 and 1 save in turn and asynchronously; the script's tenth resumes on another layout."""
    assert tool("kill_and_resume").run(2, seed=3) == []
