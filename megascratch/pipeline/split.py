"""`split_backward`: give a schedule of F and I its W, each where its rank would otherwise wait.

W has no one waiting for it, so it fills bubbles; but an activation is held until its W, so W also comes when memory is
full. Executing the lists by their costs, a rank whose next action is not ready yet, or may not add another activation,
does its oldest W. 1F1B's order of F and I, pp = 2, m = 3, F = I = W = 1, limit 2, gives ZB-H1:

    time     0    1    2    3    4    5    6    7    8    9
    rank 0   0F0  0F1  .    0I0  0W0  0F2  0I1  0W1  0I2  0W2
    rank 1   .    1F0  1I0  1F1  1I1  1W0  1F2  1I2  1W1  1W2

Source: the heuristic of Qi et al. 2023, arXiv:2401.10241, section 3.1, with the order of F and I given.
"""

import heapq
from collections import deque
from dataclasses import replace

from megascratch.pipeline.action import Action, Kind, delivery, input_of
from megascratch.pipeline.costs import Costs
from megascratch.pipeline.schedule import Schedule

# A rank that knows its next input to come before this part of a W has passed waits for it: starting a W there would
# hold up the other ranks for longer than it fills the gap. Half loses least for gaps of any length.
_PATIENCE = 0.5

# Costs are added up in different orders on different ranks: times closer than this are the same moment.
_SAME_TIME = 1e-9


def split_backward(schedule: Schedule, limit: int, costs: Costs) -> Schedule:
    """Place every W.

    Args:
        schedule: of F and I alone, executable, in any order.
        limit: most activations a rank may hold, in stages × microbatches; where the order of F and I alone holds more,
            it holds that many.
        costs: of actions; the order of W depends on their ratios.

    Returns: the schedule with a W for every I. The W of each stage stand in the order of their I.
    """
    ranks = [_Rank(deque(actions)) for actions in schedule.actions]
    arrived: dict[Action, float] = {}
    due = [(0.0, rank) for rank in range(len(ranks))]  # when a rank can decide again
    while due:
        now, index = heapq.heappop(due)
        rank = ranks[index]
        if now < rank.free - _SAME_TIME:
            continue  # it has started something in the meantime
        action = rank.choose(now, limit, arrived, schedule.n_stages, costs)
        if action is None:
            continue
        start = now
        if (receive := input_of(action, schedule.n_stages)) is not None:
            start = max(now, arrived[receive])
        rank.free = start + costs.of(action)
        heapq.heappush(due, (rank.free, index))
        if action.kind is not Kind.W and (transfer := delivery(action, schedule.n_stages)) is not None:
            target = schedule.rank_of(transfer[1])
            arrived[transfer[1]] = rank.free + (costs.transfer if target != index else 0.0)
            if target != index:
                # It is told when the work starts, so that it can tell a short gap from a long one.
                heapq.heappush(due, (max(now, ranks[target].free), target))
    assert not any(rank.order for rank in ranks), "the order of F and I cannot be executed"
    return replace(schedule, actions=[rank.done for rank in ranks])


class _Rank:
    """One rank on the way: what is left of its order, the W that it owes, what it has done."""

    def __init__(self, order: deque[Action]) -> None:
        self.order = order
        self.owed: deque[Action] = deque()
        self.done: list[Action] = []
        self.held = 0
        self.free = 0.0

    def choose(
        self, now: float, limit: int, arrived: dict[Action, float], n_stages: int, costs: Costs
    ) -> Action | None:
        """Take the next action of the order, or an owed W instead, or None to wait to be told of an arrival."""
        if self.order and self._in_time(self.order[0], now, limit, arrived, n_stages, costs):
            action = self.order.popleft()
            if action.kind is Kind.F:
                self.held += 1
            else:
                self.owed.append(Action(action.stage, Kind.W, action.microbatch))
        elif self.owed:
            action = self.owed.popleft()
            self.held -= 1
        else:
            return None
        self.done.append(action)
        return action

    def _in_time(
        self, action: Action, now: float, limit: int, arrived: dict[Action, float], n_stages: int, costs: Costs
    ) -> bool:
        """Return whether the next action of the order goes before an owed W."""
        receive = input_of(action, n_stages)
        if receive is not None and receive not in arrived:
            return False
        if not self.owed:
            return True
        if action.kind is Kind.F and self.held >= limit:
            return False
        wait = arrived[receive] - now if receive is not None else 0.0
        return wait < _PATIENCE * costs.of(self.owed[0]) + _SAME_TIME
