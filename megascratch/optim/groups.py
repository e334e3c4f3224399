"""Which parameters learn how fast: groups by name, weight decay, and what does not learn at all.

A pattern is matched against the global name of a parameter, as the shell matches files; the first group that has one
that fits decides:

    [optim]
    frozen = ["embed.*", "layers.[0-3].*"]
    [[optim.groups]]
    params = ["*.qkv.weight", "head.*"]
    lr_scale = 0.1
    weight_decay = 0.0
"""

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import NamedTuple

from megascratch.config import OptimConfig
from megascratch.dist.layout import ParamSpec
from megascratch.errors import ConfigError, Problem


class Pace(NamedTuple):
    """How a parameter moves: its factor on the learning rate, and its weight decay."""

    lr_scale: float
    weight_decay: float


def pace_of(optim: OptimConfig, spec: ParamSpec) -> Pace:
    """Return how a parameter moves. Norms and biases do not decay unless a group says so."""
    default = optim.weight_decay if spec.decay else 0.0
    for group in optim.groups:
        if _matches(spec.name, group.params):
            return Pace(group.lr_scale, default if group.weight_decay is None else group.weight_decay)
    return Pace(1.0, default)


def is_frozen(optim: OptimConfig, name: str) -> bool:
    """Return whether a parameter keeps its values."""
    return _matches(name, optim.frozen)


def require_names(optim: OptimConfig, names: Iterable[str]) -> None:
    """Check the patterns against all parameters of the model.

    Raises: ConfigError: if a pattern fits none of them, or nothing is left to learn.
    """
    names = list(names)
    given = {"optim.frozen": optim.frozen}
    given |= {f"optim.groups[{i}].params": group.params for i, group in enumerate(optim.groups)}
    problems = [
        Problem(f"{key} = {pattern}", "fits no parameter of the model", f"names are as {names[0]} and {names[-1]}")
        for key, patterns in given.items()
        for pattern in patterns
        if not any(fnmatchcase(name, pattern) for name in names)
    ]
    if all(is_frozen(optim, name) for name in names):
        problems.append(Problem("optim.frozen", "leaves nothing to learn", "leave a parameter out"))
    if problems:
        raise ConfigError(problems)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
