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

from megascratch.errors import Problem
from megascratch.pipeline.action import Action, ScheduleError, delivery, needs, rank_of


def add_communication(schedule: Sequence[Sequence[Action]], n_stages: int) -> list[list[Action]]:
    """Put the sends and receives that a schedule needs into its lists.

    Args:
        schedule: compute actions, one list a pipeline rank.
        n_stages: in the whole model; stage s lies on rank s % len(schedule).

    Returns: one list a rank; the compute actions keep their order.

    Raises: ScheduleError: if the lists hold communication already, or cannot be executed to their ends; it says what
        each stuck rank waits for.
    """
    pp = len(schedule)
    if given := [action for actions in schedule for action in actions if not action.kind.is_compute]:
        raise ScheduleError(Problem(f"{given[0]}", "a schedule lists compute only", "leave sends and receives out"))
    lists: list[list[Action]] = [[] for _ in range(pp)]
    heads = [0] * pp
    happened: set[Action] = set()
    while any(heads[rank] < len(schedule[rank]) for rank in range(pp)):
        ready = [
            (rank, schedule[rank][heads[rank]])
            for rank in range(pp)
            if heads[rank] < len(schedule[rank]) and happened.issuperset(needs(schedule[rank][heads[rank]], n_stages))
        ]
        if not ready:
            raise ScheduleError(_stuck(schedule, heads, happened, n_stages))
        for rank, action in ready:
            lists[rank].append(action)
            heads[rank] += 1
        for _, action in ready:
            happened.add(action)
            if (transfer := delivery(action, n_stages)) is not None:
                send, receive = transfer
                happened.add(receive)
                if rank_of(send.stage, pp) != rank_of(receive.stage, pp):
                    lists[rank_of(send.stage, pp)].append(send)
                    lists[rank_of(receive.stage, pp)].append(receive)
    return lists


def _stuck(
    schedule: Sequence[Sequence[Action]], heads: Sequence[int], happened: set[Action], n_stages: int
) -> list[Problem]:
    """Say, for every rank that has not finished, which action it stands at and what that action lacks."""
    problems = []
    for rank, actions in enumerate(schedule):
        if heads[rank] < len(actions):
            action = actions[heads[rank]]
            lacking = [str(need) for need in needs(action, n_stages) if need not in happened]
            problems.append(
                Problem(f"rank {rank}: {action}", f"waits for ever for {' and '.join(lacking)}", "reorder the schedule")
            )
    return problems
