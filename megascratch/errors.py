"""Typed errors: what a user did wrong, the rule it breaks, and the remedy.

Every mistake that a user can make is a `UserError`: the command line prints it without a traceback and exits with 2.
A `UserError` carries one or many `Problem`s, so that all mistakes in a recipe are shown at once:

    2 problems in run.toml
      parallel.tp = 3          must divide model.n_heads = 8                  use 1, 2, 4 or 8
      train.global_batch = 48  must divide by micro_batch 4 × dp 5            use 40 or 60

`assert` is for internal invariants only: when one fails, the fault is ours.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_STOPPED = 75  # stopped by a signal after saving a checkpoint; running again resumes (EX_TEMPFAIL in sysexits.h)


@dataclass(frozen=True)
class Problem:
    """One mistake: the offending value, the rule that it breaks, and what to do instead."""

    value: str
    rule: str
    remedy: str = ""


class MegascratchError(Exception):
    """Any error that megascratch raises on purpose."""

    exit_code = EXIT_FAILED


class CollectiveError(MegascratchError):
    """Ranks that should run one collective together are at different places; debug mode finds it before they wait."""


class UserError(MegascratchError):
    """The user's input is wrong. Exit code 2, no traceback.

    Args:
        problems: one problem, or all that were found.
        where: the file or option that they were found in, for the headline.
    """

    exit_code = EXIT_USER_ERROR

    def __init__(self, problems: Problem | Sequence[Problem], where: str = "") -> None:
        self.problems = [problems] if isinstance(problems, Problem) else list(problems)
        self.where = where
        super().__init__(self._render())

    def _render(self) -> str:
        count = f"{len(self.problems)} problem{'s' if len(self.problems) != 1 else ''}"
        headline = f"{count} in {self.where}" if self.where else count
        value_width = max((len(p.value) for p in self.problems), default=0)
        rule_width = max((len(p.rule) for p in self.problems), default=0)
        lines = [f"  {p.value:<{value_width}}  {p.rule:<{rule_width}}  {p.remedy}".rstrip() for p in self.problems]
        return "\n".join([headline, *lines])

    def __reduce__(self) -> tuple[type["UserError"], tuple[list[Problem], str]]:
        # Worker processes send their errors home; the default reduction would rebuild from the rendered text.
        return type(self), (self.problems, self.where)


class ConfigError(UserError):
    """A recipe or an option is wrong: unknown key, wrong type, or a rule across sections."""


class LayoutError(UserError):
    """A parallel layout is impossible, or a tensor does not fit the layout that it is used on."""


class DataError(UserError):
    """A dataset, corpus or sample is missing, truncated, malformed or too small."""


class TokenizerError(UserError):
    """A tokenizer file, pattern or text cannot be used."""


class CheckpointError(UserError):
    """A checkpoint is missing, incomplete, damaged, or does not fit the model."""


class DamagedCheckpoint(CheckpointError):
    """A checkpoint is not what was written: an earlier one may be good."""


class MissingDependency(UserError):
    """An optional package is not installed; the remedy names the extra that brings it."""


def exit_code_of(work: Callable[[], None]) -> int:
    """Run a script's work; a user's mistake becomes one message on stderr and its exit code, without a traceback."""
    try:
        work()
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return EXIT_DONE
