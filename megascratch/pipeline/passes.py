"""Passes over schedules: `add_communication` turns compute lists into lists that ranks can execute.

A schedule says only what each rank computes. Executing it in rounds, each rank running the head of its list if its
inputs have arrived, gives the moments at which results appear; the SEND and its RECV go into the two lists at that
same moment. 1F1B with pp = 2, m = 2:

    round   rank 0    rank 1    appended to rank 0   to rank 1
    1       0F0                 0SF0                 1RF0
    2       0F1       1F0       0SF1                 1RF1
    3                 1B0       0RB0                 1SB0
    4       0B0       1F1
    5                 1B1       0RB1                 1SB1
    6       0B1

    rank 0  0F0 0SF0 0F1 0SF1 0RB0 0B0 0RB1 0B1
    rank 1  1RF0 1F0 1RF1 1B0 1SB0 1F1 1B1 1SB1

So there is one order of all events, on all ranks, in which every send stands beside its receive. Two things follow
for any schedule. Waiting for each transfer where it stands in the list cannot deadlock; nor can anything that waits
later. And two ranks list the messages between them in the same order, in both directions together, which NCCL needs
because it pairs them by order alone.
"""

from collections.abc import Sequence
from dataclasses import replace

from megascratch.errors import Problem
from megascratch.pipeline.action import Action, ScheduleError, delivery, needs
from megascratch.pipeline.schedule import Lists, Schedule


def add_communication(schedule: Schedule) -> Schedule:
    """Put the sends and receives that a schedule needs into its lists; compute actions keep their order.

    Raises: ScheduleError: if the lists hold communication already, or an action of another rank's stage, or cannot be
        executed to their ends; it says what each stuck rank waits for.
    """
    actions, n_stages, pp = schedule.actions, schedule.n_stages, len(schedule.actions)
    if given := [action for own in actions for action in own if not action.kind.is_compute]:
        raise ScheduleError(Problem(f"{given[0]}", "a schedule lists compute only", "leave sends and receives out"))
    for rank, own in enumerate(actions):
        if strays := [action for action in own if schedule.rank_of(action) != rank]:
            rule = f"belongs on rank {schedule.rank_of(strays[0])}"
            raise ScheduleError(Problem(f"rank {rank}: {strays[0]}", rule, "move it there"))
    lists: list[list[Action]] = [[] for _ in range(pp)]
    heads = [0] * pp
    happened: set[Action] = set()
    unfinished = [rank for rank in range(pp) if actions[rank]]
    while unfinished:
        ready = [
            (rank, action)
            for rank in unfinished
            for action in [actions[rank][heads[rank]]]
            if happened.issuperset(needs(action, n_stages))
        ]
        if not ready:
            raise ScheduleError(_stuck(actions, heads, happened, n_stages))
        for rank, action in ready:
            lists[rank].append(action)
            heads[rank] += 1
        for rank, action in ready:
            happened.add(action)
            if (transfer := delivery(action, n_stages)) is not None:
                send, receive = transfer
                happened.add(receive)
                if (target := schedule.rank_of(receive)) != rank:
                    lists[rank].append(send)
                    lists[target].append(receive)
        unfinished = [rank for rank in unfinished if heads[rank] < len(actions[rank])]
    return replace(schedule, actions=lists)


def _stuck(actions: Lists, heads: Sequence[int], happened: set[Action], n_stages: int) -> list[Problem]:
    """Say, for every rank that has not finished, which action it stands at and what that action lacks."""
    problems = []
    for rank, own in enumerate(actions):
        if heads[rank] < len(own):
            action = own[heads[rank]]
            lacking = [str(need) for need in needs(action, n_stages) if need not in happened]
            problems.append(
                Problem(f"rank {rank}: {action}", f"waits for ever for {' and '.join(lacking)}", "reorder the schedule")
            )
    return problems
