"""The house keeps its floors: every module is parsed, and its imports are held to DESIGN's section 3.

F7 cli                    may import any floor below, also inside a function
F5 engine    infer        never each other
F2 ops       dist         dist alone imports torch.distributed, dist/launch.py alone reads the environment
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "megascratch"
FLOORS = (
    ("errors", "log"),
    ("config",),
    ("ops", "dist"),
    ("tokenizer", "nn"),
    ("data", "pipeline", "optim", "checkpoint"),
    ("engine", "infer", "quant"),
    ("align", "evals", "serve", "plan", "curate"),
    ("cli",),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
LAUNCH = "dist/launch.py"
ENVIRONMENT = {"os.environ", "os.environb", "os.getenv", "os.getenvb", "os.putenv", "os.unsetenv"}
MAX_LINES = 400
NAMELESS = {"utils", "helpers", "common", "manager"}

MODULES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


def room_of(module: str) -> str:
    """Return the room of a file: "dist" of dist/mesh.py, "errors" of errors.py."""
    return module.partition("/")[0].removesuffix(".py")


def imported_names(tree: ast.Module, module: str) -> Iterator[str]:
    """Yield the full dotted name of everything that is imported, at any depth of the file."""
    package = ["megascratch", *module.split("/")[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base += node.module.split(".") if node.module else []
            yield from (".".join([*base, alias.name]) for alias in node.names)


def dotted_names(tree: ast.Module) -> Iterator[str]:
    """Yield every attribute access that is written as plain names with dots: torch.distributed.barrier."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield ast.unparse(node)


def layering_faults(module: str, source: str) -> list[str]:
    """Return what a module imports, or reads, that its place in the house forbids."""
    tree = ast.parse(source)
    room = room_of(module)
    faults = []
    for name in imported_names(tree, module):
        parts = name.split(".")
        if parts[0] != "megascratch" or len(parts) == 1 or parts[1] not in FLOOR_OF:
            continue
        if parts[1] != room and FLOOR_OF[parts[1]] >= FLOOR_OF[room]:
            faults.append(f"{room} on floor {FLOOR_OF[room]} imports {name} on floor {FLOOR_OF[parts[1]]}")
    used = [*imported_names(tree, module), *dotted_names(tree)]
    if room != "dist":
        faults += [f"{name} outside dist/" for name in used if (name + ".").startswith("torch.distributed.")]
    if module != LAUNCH:
        faults += [f"{name} outside {LAUNCH}" for name in used if name in ENVIRONMENT]
    return faults


@pytest.mark.parametrize("module", MODULES)
def test_module_keeps_its_floor(module: str) -> None:
    if module in ("__init__.py", "__main__.py"):
        return  # the door: `python -m megascratch` is the command line
    assert room_of(module) in FLOOR_OF, "every room has a floor"
    assert layering_faults(module, (PACKAGE / module).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("module", MODULES)
def test_module_is_short_and_has_a_name_of_its_own(module: str) -> None:
    lines = (PACKAGE / module).read_text(encoding="utf-8").count("\n")
    assert lines <= MAX_LINES
    assert NAMELESS.isdisjoint(module.removesuffix(".py").split("/"))


@pytest.mark.parametrize(
    ("module", "source", "fault"),
    [
        ("nn/linear.py", "from megascratch.optim import adamw", "nn on floor 3 imports megascratch.optim.adamw"),
        ("nn/linear.py", "import megascratch.tokenizer", "nn on floor 3 imports megascratch.tokenizer on floor 3"),
        ("nn/linear.py", "from megascratch import engine", "nn on floor 3 imports megascratch.engine"),
        ("nn/linear.py", "from ..data import blend", "nn on floor 3 imports megascratch.data.blend"),
        ("nn/linear.py", "def f():\n    from megascratch.cli import app", "nn on floor 3 imports megascratch.cli.app"),
        ("errors.py", "from megascratch.log import progress", "errors on floor 0 imports megascratch.log"),
        ("nn/loss.py", "import torch.distributed as dist", "torch.distributed outside dist/"),
        ("nn/loss.py", "from torch import distributed", "torch.distributed outside dist/"),
        ("nn/loss.py", "from torch.distributed.nn import all_reduce", "torch.distributed.nn.all_reduce outside dist/"),
        ("nn/loss.py", "import torch\ntorch.distributed.barrier()", "torch.distributed.barrier outside dist/"),
        ("dist/mesh.py", "import os\nos.environ['RANK']", "os.environ outside dist/launch.py"),
        ("dist/mesh.py", "from os import getenv", "os.getenv outside dist/launch.py"),
    ],
)
def test_fault_is_found(module: str, source: str, fault: str) -> None:
    assert any(found.startswith(fault) for found in layering_faults(module, source))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("nn/linear.py", "from megascratch.dist import comm\nfrom megascratch.nn.norm import norm"),
        ("dist/comm.py", "import torch.distributed as dist"),
        ("dist/launch.py", "import os\nos.environ['RANK']"),
        ("nn/linear.py", "from . import norm\nfrom ..errors import UserError"),
        ("cli/app.py", "def f():\n    from megascratch.engine import pretrain"),
    ],
)
def test_what_is_allowed(module: str, source: str) -> None:
    assert layering_faults(module, source) == []
