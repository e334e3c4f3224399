"""`check`: prove, before any rank starts, that a schedule with its communication computes a step and comes to its end.

Four questions, in this order, since each makes sense only when the one before is answered yes:

    complete    every action that the step needs stands on its rank exactly once, and no other
    ordered     on every rank, an action stands after what it needs
    finishes    with each send waiting for its receive, and each receive for its send, no rank is left standing
    fits        no rank holds the activations of more microbatches than it may

The third is stricter than what the runner does, which waits later: a schedule that passes runs on any backend.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megascratch.errors import Problem
from megascratch.pipeline.action import Action, Kind, ScheduleError, delivery, needs, partner
from megascratch.pipeline.schedule import Lists, Schedule

_SHOWN = 8  # problems in one message; a dropped action of stage 0 alone would otherwise name every later stage


@dataclass(frozen=True)
class Report:
    """What is known of a schedule that passed.

    Attributes:
        peak_in_flight: for each rank, the most activations held at once, counted in (stage, microbatch) pairs: from F
            to B, or to W where the backward is split.
    """

    peak_in_flight: tuple[int, ...]


def check(schedule: Schedule, max_in_flight: int | None = None, *, backward: bool = True) -> Report:
    """Check a schedule that `add_communication` has completed.

    Args:
        schedule: communication included.
        max_in_flight: most activations, in stages × microbatches, that a rank may hold; None for no bound.
        backward: False for a schedule of forwards alone.

    Raises: ScheduleError: with the reasons, if the schedule is wrong.
    """
    for find in (
        _incomplete(schedule, backward),
        _disordered(schedule.actions, schedule.n_stages),
        _deadlocked(schedule.actions),
    ):
        if problems := list(find):
            more = len(problems) - _SHOWN
            rest = [Problem(f"and {more} more", "of the same kind")] if more > 0 else []
            raise ScheduleError(problems[:_SHOWN] + rest, where="the pipeline schedule")
    peaks = tuple(peak_in_flight(actions) for actions in schedule.actions)
    if max_in_flight is not None and max(peaks) > max_in_flight:
        rank = peaks.index(max(peaks))
        rule = f"must hold at most {max_in_flight} activations at once, holds {peaks[rank]}"
        raise ScheduleError(Problem(f"rank {rank}", rule, "start backwards earlier"), where="the pipeline schedule")
    return Report(peaks)


def _incomplete(schedule: Schedule, backward: bool) -> Iterator[Problem]:
    """Yield what is missing, doubled or out of place."""
    pp = len(schedule.actions)
    expected = _expected(schedule, backward)
    counts = [Counter(actions) for actions in schedule.actions]
    for action, home in expected.items():
        count = counts[home][action]
        if count != 1:
            pair = "" if action.kind.is_compute else f"; it pairs with {partner(action)}"
            rule = f"must stand on rank {home} exactly once, not {count} times{pair}"
            yield Problem(str(action), rule, "add it" if count == 0 else "drop the others")
    for rank, count_of in enumerate(counts):
        for action in count_of:
            if action not in expected:
                rule = f"has no place among {schedule.n_stages} stages and {schedule.n_microbatches} microbatches"
                yield Problem(f"rank {rank}: {action}", f"{rule} on {pp} ranks", "drop it")
            elif expected[action] != rank:
                yield Problem(f"rank {rank}: {action}", f"belongs on rank {expected[action]}", "move it there")


def _expected(schedule: Schedule, backward: bool) -> dict[Action, int]:
    """Return the rank of every action that the step needs: whole backwards, but for those the schedule splits."""
    split = {(a.stage, a.microbatch) for actions in schedule.actions for a in actions if a.kind in (Kind.I, Kind.W)}
    expected: dict[Action, int] = {}
    for stage in range(schedule.n_stages):
        for microbatch in range(schedule.n_microbatches):
            kinds = [Kind.F]
            if backward:
                kinds += [Kind.I, Kind.W] if (stage, microbatch) in split else [Kind.B]
            for kind in kinds:
                action = Action(stage, kind, microbatch)
                expected[action] = home = schedule.rank_of(action)
                transfer = delivery(action, schedule.n_stages)
                if transfer is not None and (target := schedule.rank_of(transfer[1])) != home:
                    expected.update(zip(transfer, (home, target)))
    return expected


def _disordered(schedule: Lists, n_stages: int) -> Iterator[Problem]:
    """Yield every action that stands before something of its own rank that it needs."""
    for rank, actions in enumerate(schedule):
        happened: set[Action] = set()  # on this rank: computed, received, handed over, or ready to be sent
        for action in actions:
            if action.kind in (Kind.SEND_F, Kind.SEND_B) and action not in happened:
                yield Problem(f"rank {rank}: {action}", "stands before what it sends is computed", "move it later")
            for need in needs(action, n_stages) if action.kind.is_compute else []:
                if need not in happened:
                    yield Problem(f"rank {rank}: {action}", f"stands before {need}, which it needs", "move it later")
            happened.add(action)
            if action.kind.is_compute:
                happened.update(delivery(action, n_stages) or ())


def _deadlocked(schedule: Lists) -> Iterator[Problem]:
    """Run the lists with blocking transfers, and yield where ranks are left standing, if they are.

    A rank that stands at a transfer moves on only together with the rank that stands at its partner.
    """
    place = {action: rank for rank, actions in enumerate(schedule) for action in actions}
    heads = [0] * len(schedule)

    def advance(rank: int) -> Action | None:
        """Run a rank up to its next transfer and return that, or None at the end of its list."""
        actions = schedule[rank]
        while heads[rank] < len(actions) and actions[heads[rank]].kind.is_compute:
            heads[rank] += 1
        return actions[heads[rank]] if heads[rank] < len(actions) else None

    waiting = {rank: action for rank in range(len(schedule)) if (action := advance(rank)) is not None}
    moved = list(waiting)
    while moved:
        rank = moved.pop()
        if rank not in waiting:  # its partner took it to its end
            continue
        awaited = partner(waiting[rank])
        peer = place[awaited]
        if waiting.get(peer) != awaited:
            continue
        for one in (rank, peer):
            heads[one] += 1
            following = advance(one)
            if following is None:
                del waiting[one]
            else:
                waiting[one] = following
                moved.append(one)
    for rank, action in sorted(waiting.items()):
        peer = place[partner(action)]  # still waiting too: it cannot have passed its half of the transfer
        rule = f"waits for ever for {partner(action)} of rank {peer}, which stands at {waiting[peer]}"
        yield Problem(f"rank {rank}: {action}", rule, "reorder the schedule")


def peak_in_flight(actions: Sequence[Action]) -> int:
    """Return the most activations that a rank holds at once, from F to B, or to W where the backward is split."""
    peak = held = 0
    for action in actions:
        if action.kind is Kind.F:
            held += 1
            peak = max(peak, held)
        elif action.kind in (Kind.B, Kind.W):
            held -= 1
    return peak
