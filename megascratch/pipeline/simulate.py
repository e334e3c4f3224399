"""`simulate`: when every action of a schedule happens, given what each costs; bubble, memory and critical path follow.

A rank works through its list. A compute action starts when the rank is free and its inputs are here; its result is on
another rank `transfer` later, while the rank goes on. 1F1B, pp = 2, m = 2, F = 1, B = 2:

    time     0    1    2    3    4    5    6    7    8    9
    rank 0   0F0  0F1  .    .    0B0  0B0  .    0B1  0B1       window 0 … 9, busy 6
    rank 1   .    1F0  1B0  1B0  1F1  1B1  1B1  .    .         window 1 … 7, busy 6

Two bubbles, since papers differ in what they let overlap:

    bubble        of the rank with the longest window, from its first action to its last: 1 − 6/9. The papers' number:
                  a rank that is done early may start the next step early.
    step_bubble   of the whole step: every rank waits for the last. It holds where the optimizer step is a barrier, as
                  with clipping by a global norm. No schedule of one stage a rank is below (pp − 1) F here.

Source: Qi et al. 2023, arXiv:2401.10241, section 5.3, for the first.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megascratch.pipeline.action import Action, delivery, input_of
from megascratch.pipeline.check import peak_in_flight
from megascratch.pipeline.costs import UNIT, Costs
from megascratch.pipeline.schedule import Schedule


class Event(NamedTuple):
    """An action on its rank, from `start` to `end`, in the unit of the costs; sends and receives take no time."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """What happens when, on every rank, simulated or recorded.

    Attributes:
        events: one list a rank, in the order of execution.
    """

    events: Sequence[Sequence[Event]]

    @property
    def makespan(self) -> float:
        """From the first start on any rank to the last end."""
        computes = self.computes()
        return max(own[-1].end for own in computes) - min(own[0].start for own in computes)

    @property
    def bubble(self) -> float:
        """Idle fraction of the rank with the longest time from its first action to its last."""
        longest, busy = max((own[-1].end - own[0].start, _busy(own)) for own in self.computes())
        return 1 - busy / longest

    @property
    def step_bubble(self) -> float:
        """Idle fraction of all ranks over the whole step."""
        busy = sum(_busy(own) for own in self.computes())
        return 1 - busy / (self.makespan * len(self.events))

    @property
    def peak_in_flight(self) -> tuple[int, ...]:
        """Most activations that each rank holds at once; see `check.peak_in_flight`."""
        return tuple(peak_in_flight([event.action for event in own]) for own in self.events)

    def computes(self) -> list[list[Event]]:
        """Return the events without sends and receives."""
        return [[event for event in own if event.action.kind.is_compute] for own in self.events]


def _busy(events: Sequence[Event]) -> float:
    return sum(event.end - event.start for event in events)


def simulate(schedule: Schedule, costs: Costs = UNIT) -> Timeline:
    """Execute a checked schedule on paper.

    Args:
        schedule: that passes `check`, with its communication or without.
        costs: times of actions.

    Returns: events in the order of each rank's list.
    """
    n_stages, pp = schedule.n_stages, len(schedule.actions)
    arrived: dict[Action, float] = {}  # by the receive, also where a stage hands over on its own rank
    events: list[list[Event]] = [[] for _ in range(pp)]
    clocks, heads = [0.0] * pp, [0] * pp
    waiting: dict[Action, int] = {}  # receive → the rank that stands before its consumer
    runnable = list(range(pp))
    while runnable:
        rank = runnable.pop()
        own, log, now = schedule.actions[rank], events[rank], clocks[rank]
        for head in range(heads[rank], len(own)):
            action = own[head]
            if not action.kind.is_compute:
                log.append(Event(action, now, now))
                continue
            start = now
            if (receive := input_of(action, n_stages)) is not None:
                if receive not in arrived:
                    waiting[receive] = rank
                    break
                start = max(now, arrived[receive])
            now = start + costs.of(action)
            log.append(Event(action, start, now))
            if (transfer := delivery(action, n_stages)) is not None:
                here = schedule.rank_of(transfer[1]) == rank
                arrived[transfer[1]] = now if here else now + costs.transfer
                if transfer[1] in waiting:
                    runnable.append(waiting.pop(transfer[1]))
        else:
            head = len(own)
        clocks[rank], heads[rank] = now, head
    assert all(head == len(own) for head, own in zip(heads, schedule.actions)), "the schedule does not come to its end"
    return Timeline(events)


def critical_path(timeline: Timeline, schedule: Schedule, costs: Costs = UNIT) -> list[Event]:
    """Return a chain of compute events, each starting when the one before lets it, that ends with the step.

    The step cannot be faster unless one of them is, or a transfer between them.
    """
    n_stages = schedule.n_stages
    before: dict[Action, Event] = {}  # what ran on the same rank just before
    producer: dict[Action, Event] = {}  # by receive
    for own in timeline.computes():
        for previous, event in itertools.pairwise(own):
            before[event.action] = previous
        for event in own:
            if (transfer := delivery(event.action, n_stages)) is not None:
                producer[transfer[1]] = event
    path = [max((own[-1] for own in timeline.computes()), key=lambda event: event.end)]
    while True:
        action = path[-1].action
        receive = input_of(action, n_stages)
        candidates = [before[action]] if action in before else []
        if receive is not None:
            candidates.append(producer[receive])
        if not candidates:
            return path[::-1]
        # The later of the two is what the action waited for; a result from another rank counts with its transfer.
        path.append(max(candidates, key=lambda event: event.end + _transfer(event, action, schedule, costs)))


def _transfer(event: Event, consumer: Action, schedule: Schedule, costs: Costs) -> float:
    return costs.transfer if schedule.rank_of(event.action) != schedule.rank_of(consumer) else 0.0
