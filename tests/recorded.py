"""Functions of other libraries, played by stand-ins that have the signatures that were recorded of their releases."""

import inspect
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

RECORDED: dict[str, dict[str, dict[str, dict[str, str]]]] = json.loads(
    (Path(__file__).parent / "ops/recorded_signatures.json").read_text()
)
Body = Callable[[dict[str, Any]], Any]


def with_signature(text: str, body: Body) -> Callable[..., Any]:
    """A function that has the recorded signature and nothing more; the body gets its arguments by name."""
    signature = inspect.signature(eval(f"lambda {text[1:-1]}: None"))

    def stand_in(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return body(bound.arguments)

    stand_in.__signature__ = signature  # type: ignore[attr-defined]
    return stand_in


@contextmanager
def installed(
    library: str, release: str, bodies: Mapping[str, Body], besides: Mapping[str, ModuleType] | None = None
) -> Iterator[dict[str, ModuleType]]:
    """Have a release of a library with the functions that have a body, and further modules; yields all by path."""
    modules: dict[str, ModuleType] = dict(besides or {})
    for path, functions in RECORDED[library][release].items():
        parts = path.split(".")
        for depth in range(1, len(parts) + 1):
            modules.setdefault(".".join(parts[:depth]), ModuleType(parts[depth - 1]))
        for name, text in functions.items():
            if name in bodies:
                setattr(modules[path], name, with_signature(text, bodies[name]))
    with pytest.MonkeyPatch.context() as patched:
        for path, module in modules.items():  # one by one: `patch.dict` would forget what torch imports meanwhile
            patched.setitem(sys.modules, path, module)
        yield modules
