"""`Schedule`: one list of actions a rank, and the routes that say on which rank each stage lies.

A route is the rank of every stage, in the order in which a microbatch visits them:

    looped      pp = 3, vp = 2     0 1 2 0 1 2     a rank that holds several stages meets a microbatch once a round
    v_shaped    pp = 3             0 1 2 2 1 0     the first rank holds the last stage too, and starts the backward
    mirrored    pp = 4             0 1 2 3         two copies of the model, in opposite directions: the first half of
                                   3 2 1 0         the microbatches takes the first route, the second half the other

As text, a schedule is one line a rank, of compute actions alone; `#` starts a comment. 1F1B, pp = 2, m = 2:

    0F0 0F1 0B0 0B1
    1F0 1B0 1F1 1B1        # the line says the rank, so any placement of stages can be written
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megascratch.errors import Problem
from megascratch.pipeline.action import Action, ScheduleError

Lists = Sequence[Sequence[Action]]  # one a rank, in the order of execution
Route = tuple[int, ...]  # the rank of each stage

_MAX_TEXT = 64 * 2**20  # a file of 10⁶ actions is 8 MB; this bounds what a wrong path can read


def looped(pp: int, vp: int) -> tuple[Route, ...]:
    """Return the route that goes round the ranks vp times."""
    return (tuple(range(pp)) * vp,)


def v_shaped(pp: int, vp: int = 2) -> tuple[Route, ...]:
    """Return the route that goes down the ranks and comes back up; two stages a rank.

    Raises: ScheduleError: unless vp = 2.
    """
    if vp != 2:
        raise ScheduleError(Problem(f"vp = {vp}", "a V has two stages on every rank", "use vp = 2"))
    return ((*range(pp), *reversed(range(pp))),)


def mirrored(pp: int, vp: int = 1) -> tuple[Route, ...]:
    """Return the routes of two copies of the model: down the ranks, and up; one stage of each copy a rank.

    Raises: ScheduleError: if vp is not 1, or pp is odd: the middle rank would meet itself.
    """
    if vp != 1:
        raise ScheduleError(Problem(f"vp = {vp}", "two copies of the model have one stage a rank", "use vp = 1"))
    if pp % 2:
        raise ScheduleError(Problem(f"pp = {pp}", "must be even for two copies of the model", f"use {pp + 1}"))
    return tuple(range(pp)), tuple(reversed(range(pp)))


@dataclass(frozen=True)
class Schedule:
    """What every rank does in a step.

    Attributes:
        actions: one list a rank, in the order of execution.
        routes: the rank of each stage; the microbatches are divided over the routes, the first ones to the first.
        n_microbatches: in a step.
    """

    actions: Lists
    routes: tuple[Route, ...]
    n_microbatches: int

    @property
    def n_stages(self) -> int:
        return len(self.routes[0])

    def rank_of(self, action: Action) -> int:
        """Return the rank that executes an action."""
        return self.routes[action.microbatch * len(self.routes) // self.n_microbatches][action.stage]

    def stages_of(self, rank: int) -> list[int]:
        """Return the stages that a rank holds, in order."""
        return sorted({stage for route in self.routes for stage, holder in enumerate(route) if holder == rank})

    def __str__(self) -> str:
        return "".join(" ".join(str(a) for a in actions if a.kind.is_compute) + "\n" for actions in self.actions)


def parse_schedule(text: str, where: str = "") -> Schedule:
    """Read a schedule from text; what it means is for `add_communication` and `check` to judge.

    Args:
        text: one line a rank; blank lines and comments do not count.
        where: the file, for messages.

    Raises: ScheduleError: if a word is no action, or a stage or microbatch is left out.
    """
    if len(text) > _MAX_TEXT:
        raise ScheduleError(Problem(f"{len(text)} characters", f"must be at most {_MAX_TEXT}", "check the path"), where)
    lines = [words for line in text.splitlines() if (words := line.partition("#")[0].split())]
    try:
        lists = [[Action.parse(word) for word in words] for words in lines]
    except ScheduleError as error:
        raise ScheduleError(error.problems, where) from None
    if not lists:
        raise ScheduleError(Problem("the schedule", "has no actions", "write one line a rank"), where)
    _number_without_gaps("stage", {action.stage for actions in lists for action in actions}, where)
    microbatches = {action.microbatch for actions in lists for action in actions}
    _number_without_gaps("microbatch", microbatches, where)
    # A stage on two ranks is for the checker to refuse; here the first of them has it.
    holder = {action.stage: rank for rank, actions in reversed([*enumerate(lists)]) for action in actions}
    return Schedule(lists, (tuple(holder[stage] for stage in range(len(holder))),), len(microbatches))


def _number_without_gaps(name: str, found: set[int], where: str) -> None:
    """Raise a ScheduleError unless the numbers are 0 … n − 1."""
    for number in range(len(found)):
        if number not in found:
            raise ScheduleError(Problem(f"{name} {number}", "stands nowhere", "number from 0, without gaps"), where)
