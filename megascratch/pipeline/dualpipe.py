"""DualPipe: microbatches enter the pipeline from both ends, so that each rank always has a forward of one and a
backward of the other to run side by side.

DualPipe keeps two copies of the model, in opposite directions; half of the microbatches go each way. Seen from the
middle, its two halves do the same thing. So one half, with both stages on each rank, needs no second copy: DualPipeV.
Rank i of pp, counted from the end where microbatches enter, runs (0 the stage that it meets first, 1 the other)

    2 (pp − i − 1)      F0
    i + 1               F0 F1
    pp − i − 1          I1 F1             the W are filled in by `split_backward`
    m − 2 pp + i + 1    F0 I1 F1 I0       the steady state
    pp − i − 1          I1 F1 I0
    i + 1               I1 I0
    pp − i − 1          I0

Sources: DeepSeek-AI 2024, arXiv:2412.19437, section 3.2.1; Qi et al. 2025, "Cut-in-half", for the V.
"""

from megascratch.errors import Problem
from megascratch.pipeline.action import Action, Kind, ScheduleError
from megascratch.pipeline.schedule import Lists

_FORWARD, _BACKWARD = (0, Kind.F), (0, Kind.I)  # of the stage that the rank meets first
_FORWARD_BACK, _BACKWARD_BACK = (1, Kind.F), (1, Kind.I)  # of the other one

Step = tuple[int, Kind]


def dualpipe_v(pp: int, vp: int, m: int) -> Lists:
    """DualPipe folded into a V: stage s on rank s or 2 pp − 1 − s; at most 2 pp + 1 activations of half-sized stages.

    Raises: ScheduleError: unless m ≥ 2 pp.
    """
    _enough_microbatches("dualpipe-v", m, 2 * pp)
    return [_execute(_steps(pp, rank, m), [(rank, 0), (2 * pp - 1 - rank, 0)]) for rank in range(pp)]


def dualpipe(pp: int, vp: int, m: int) -> Lists:
    """Two copies of the model: stage s on rank s for the first half of the microbatches, on pp − 1 − s for the others.

    Raises: ScheduleError: unless m is even and m ≥ 2 pp.
    """
    _enough_microbatches("dualpipe", m, 2 * pp)
    if m % 2:
        rule = "must be even for dualpipe: half of them go each way"
        raise ScheduleError(Problem(f"microbatches = {m}", rule, f"use {m + 1}"))
    lists = []
    for rank in range(pp):
        from_end = min(rank, pp - 1 - rank)
        # (stage, first microbatch) of the direction that starts at the nearer end, and of the other one.
        ways = [(rank, 0), (pp - 1 - rank, m // 2)]
        lists.append(_execute(_steps(pp // 2, from_end, m // 2), ways if rank < pp // 2 else ways[::-1]))
    return lists


def _steps(pp: int, rank: int, m: int) -> list[Step]:
    """Return a rank's order, as in the table above."""
    after = pp - rank - 1
    return [
        *([_FORWARD] * (2 * after)),
        *([_FORWARD, _FORWARD_BACK] * (rank + 1)),
        *([_BACKWARD_BACK, _FORWARD_BACK] * after),
        *([_FORWARD, _BACKWARD_BACK, _FORWARD_BACK, _BACKWARD] * (m - 2 * pp + rank + 1)),
        *([_BACKWARD_BACK, _FORWARD_BACK, _BACKWARD] * after),
        *([_BACKWARD_BACK, _BACKWARD] * (rank + 1)),
        *([_BACKWARD] * after),
    ]


def _execute(steps: list[Step], ways: list[tuple[int, int]]) -> list[Action]:
    """Number the steps: each way has a stage and counts its microbatches from a first one."""
    counts: dict[Step, int] = {}
    actions = []
    for step in steps:
        way, kind = step
        stage, first = ways[way]
        actions.append(Action(stage, kind, first + counts.get(step, 0)))
        counts[step] = counts.get(step, 0) + 1
    return actions


def _enough_microbatches(name: str, m: int, least: int) -> None:
    if m < least:
        rule = f"must be at least {least} for {name}: twice the ranks"
        raise ScheduleError(Problem(f"microbatches = {m}", rule, "use more microbatches, or zb-v"))
