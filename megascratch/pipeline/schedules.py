"""Schedules: in which order each pipeline rank computes. Pure functions of three numbers.

    pp   pipeline ranks
    vp   stages on each rank (virtual pipeline size), so that there are pp · vp stages
    m    microbatches in a step

Each returns one list of compute actions a rank. `make_schedule` joins the list with the routes of its stages, and where
a schedule splits the backward, `split_backward` puts in the weight gradients by what actions cost; `add_communication`
puts in the sends and receives. In the diagrams a column is one unit of time, F and B take one each, and the digit is
the microbatch.
"""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from megascratch.errors import Problem
from megascratch.pipeline.action import Action, Kind, ScheduleError
from megascratch.pipeline.costs import UNIT, Costs
from megascratch.pipeline.dualpipe import dualpipe, dualpipe_v
from megascratch.pipeline.schedule import Lists, Route, Schedule, looped, mirrored, v_shaped
from megascratch.pipeline.split import split_backward
from megascratch.pipeline.zero_bubble import v_half, v_min, zb_h1, zb_h2, zb_v


def gpipe(pp: int, vp: int, m: int) -> Lists:
    """All forwards, then all backwards.

    pp = 3, m = 4:

        rank 0   F0 F1 F2 F3 .  .  .  .  B0 B1 B2 B3
        rank 1   .  F0 F1 F2 F3 .  .  B0 B1 B2 B3 .
        rank 2   .  .  F0 F1 F2 F3 B0 B1 B2 B3 .  .

    Every rank holds the activations of all m microbatches at once. Backwards run in the order of the microbatches, as
    in every other schedule, so that gradients are summed in the same order and agree bit for bit.
    Source: Huang et al. 2019, arXiv:1811.06965, section 2.
    """
    return [[Action(rank, kind, i) for kind in (Kind.F, Kind.B) for i in range(m)] for rank in range(pp)]


def one_f_one_b(pp: int, vp: int, m: int) -> Lists:
    """Warm up with as many forwards as stages follow, then alternate one forward, one backward, then drain.

    pp = 3, m = 4:

        rank 0   F0 F1 F2 .  .  B0 F3 B1 .  B2 .  B3
        rank 1   .  F0 F1 .  B0 F2 B1 F3 B2 .  B3 .
        rank 2   .  .  F0 B0 F1 B1 F2 B2 F3 B3 .  .

    Rank i holds the activations of at most min(m, pp − i) microbatches.
    Source: Narayanan et al. 2021, arXiv:2104.04473, section 2.2.1.
    """
    return [
        _alternate(
            [Action(rank, Kind.F, i) for i in range(m)],
            [Action(rank, Kind.B, i) for i in range(m)],
            warmup=pp - rank - 1,
        )
        for rank in range(pp)
    ]


def interleaved(pp: int, vp: int, m: int) -> Lists:
    """1F1B with vp stages on a rank: a round of microbatches goes through one stage before it goes through the next.

    pp = 2, vp = 2, m = 2; rank 0 holds stages 0 and 2, rank 1 stages 1 and 3:

        rank 0   0F0 0F1 2F0 2F1 .   2B0 .   2B1 0B0 0B1
        rank 1   .   1F0 1F1 3F0 3B0 3F1 3B1 1B0 1B1 .

    A stage is 1/vp of a rank's layers, so the pipeline fills and drains in 1/vp of the time. A round is pp microbatches
    where pp divides m, and a few more where it does not: with fewer, a rank would wait for its own result. Rank i warms
    up with 2 (pp − i − 1) + (vp − 1) · round forwards and holds at most one more stage's activations than that.
    Source: Narayanan et al. 2021, arXiv:2104.04473, section 2.2.2; warm-up counts as in Megatron-LM.
    """
    n_rounds = max(1, m // pp)
    first = -(-m // n_rounds)  # the rounds are as even as can be, and the first is one of the longest
    starts = [m - (n_rounds - index) * m // n_rounds for index in range(n_rounds + 1)]
    order = [
        (chunk, microbatch)
        for start, stop in itertools.pairwise(starts)
        for chunk in range(vp)
        for microbatch in range(start, stop)
    ]
    return [
        _alternate(
            [Action(chunk * pp + rank, Kind.F, i) for chunk, i in order],
            [Action((vp - 1 - chunk) * pp + rank, Kind.B, i) for chunk, i in order],
            warmup=2 * (pp - rank - 1) + (vp - 1) * first,
        )
        for rank in range(pp)
    ]


def forward_only(routes: tuple[Route, ...], m: int) -> Schedule:
    """Forwards alone, for evaluation: of what is ready, each rank runs what is furthest on its way.

    pp = 2, looped twice, m = 3:

        rank 0   0F0 0F1 2F0 2F1 0F2 .   2F2 .
        rank 1   .   1F0 1F1 3F0 3F1 1F2 .   3F2
    """
    pp, n_stages = max(routes[0]) + 1, len(routes[0])
    schedule = Schedule([[] for _ in range(pp)], routes, m)
    lists: list[list[Action]] = [[] for _ in range(pp)]
    ready: list[list[Action]] = [[] for _ in range(pp)]
    for microbatch in range(m):
        first = Action(0, Kind.F, microbatch)
        ready[schedule.rank_of(first)].append(first)
    while any(ready):
        chosen = [max(own, key=lambda action: (action.stage, -action.microbatch)) for own in ready if own]
        for action in chosen:
            rank = schedule.rank_of(action)
            ready[rank].remove(action)
            lists[rank].append(action)
            if action.stage < n_stages - 1:
                following = action._replace(stage=action.stage + 1)
                ready[schedule.rank_of(following)].append(following)
    return Schedule(lists, routes, m)


@dataclass(frozen=True)
class Family:
    """A kind of schedule.

    Attributes:
        lists: (pp, vp, m) → one list of compute actions a rank; of F and I where `limit` is given.
        routes: (pp, vp) → where the stages lie.
        n_chunks: the vp that it runs with, or None for any.
        limit: pp → the most activations a rank may hold where the backward is split, counted in stages × microbatches.
    """

    lists: Callable[[int, int, int], Lists]
    routes: Callable[[int, int], tuple[Route, ...]] = looped
    n_chunks: int | None = 1
    limit: Callable[[int], int] | None = None


SCHEDULES: Mapping[str, Family] = {
    "gpipe": Family(gpipe),
    "1f1b": Family(one_f_one_b),
    "interleaved": Family(interleaved, n_chunks=None),
    "zb-h1": Family(zb_h1, limit=lambda pp: pp),
    "zb-h2": Family(zb_h2, limit=lambda pp: 2 * pp - 1),
    "zb-v": Family(zb_v, v_shaped, n_chunks=2, limit=lambda pp: 2 * pp),
    "v-half": Family(v_half, v_shaped, n_chunks=2, limit=lambda pp: pp + 2),
    "v-min": Family(v_min, v_shaped, n_chunks=2, limit=lambda pp: 2 * pp // 3 + 3),
    "dualpipe-v": Family(dualpipe_v, v_shaped, n_chunks=2, limit=lambda pp: 2 * pp + 1),
    "dualpipe": Family(dualpipe, mirrored, limit=lambda pp: pp + 1),
}


def make_schedule(name: str, pp: int, vp: int, m: int, costs: Costs = UNIT) -> Schedule:
    """Return the compute schedule of a family.

    Args:
        name: key of `SCHEDULES`.
        pp, vp, m: ranks, stages a rank, microbatches.
        costs: decide where weight gradients go, in the families that split the backward.

    Raises: ScheduleError: if the family cannot be had in this size.
    """
    family = SCHEDULES[name]
    if family.n_chunks not in (None, vp):
        stages = "one stage" if family.n_chunks == 1 else f"{family.n_chunks} stages"
        raise ScheduleError(
            Problem(f"vp = {vp}", f"the {name} schedule runs {stages} a rank", f"use vp = {family.n_chunks}")
        )
    schedule = Schedule(family.lists(pp, vp, m), family.routes(pp, vp), m)
    return schedule if family.limit is None else split_backward(schedule, family.limit(pp), costs)


def _alternate(forwards: list[Action], backwards: list[Action], warmup: int) -> list[Action]:
    """Run `warmup` forwards, then a forward and a backward in turn, then the backwards that are left."""
    warmup = min(warmup, len(forwards))
    steady = [action for pair in zip(forwards[warmup:], backwards) for action in pair]
    return forwards[:warmup] + steady + backwards[len(forwards) - warmup :]
