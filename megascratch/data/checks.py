"""Running all checks before any of their problems is reported, so that the user meets them all at once."""

from collections.abc import Callable, Iterable

from megascratch.errors import DataError, Problem


def check_all(checks: Iterable[Callable[[], object]], where: str) -> None:
    """Run every check.

    Raises: DataError: the only one that was raised, or one with the problems of all, each led by where it was found.
    """
    errors = []
    for check in checks:
        try:
            check()
        except DataError as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        problems = [
            Problem(f"{error.where}: {problem.value}" if error.where else problem.value, problem.rule, problem.remedy)
            for error in errors
            for problem in error.problems
        ]
        raise DataError(problems, where)
