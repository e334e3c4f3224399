"""Schedules: in which order each pipeline rank computes. Pure functions of three numbers.

    pp   pipeline ranks
    vp   stages on each rank (virtual pipeline size), so that there are pp · vp stages
    m    microbatches in a step

Each returns one list of compute actions a rank; `add_communication` puts in the sends and receives. In the diagrams a
column is one unit of time, F and B take one each, and the digit is the microbatch.
"""

from collections.abc import Callable, Mapping

from megascratch.errors import Problem
from megascratch.pipeline.action import Action, Kind, ScheduleError

Schedule = list[list[Action]]  # one list a rank, in the order of execution


def gpipe(pp: int, vp: int, m: int) -> Schedule:
    """All forwards, then all backwards.

    pp = 3, m = 4:

        rank 0   F0 F1 F2 F3 .  .  .  .  B0 B1 B2 B3
        rank 1   .  F0 F1 F2 F3 .  .  B0 B1 B2 B3 .
        rank 2   .  .  F0 F1 F2 F3 B0 B1 B2 B3 .  .

    Every rank holds the activations of all m microbatches at once. Backwards run in the order of the microbatches, as
    in every other schedule, so that gradients are summed in the same order and agree bit for bit.
    Source: Huang et al. 2019, arXiv:1811.06965, section 2.

    Raises: ScheduleError: if vp > 1.
    """
    _one_stage_a_rank("gpipe", vp)
    return [[Action(rank, kind, i) for kind in (Kind.F, Kind.B) for i in range(m)] for rank in range(pp)]


def one_f_one_b(pp: int, vp: int, m: int) -> Schedule:
    """Warm up with as many forwards as stages follow, then alternate one forward, one backward, then drain.

    pp = 3, m = 4:

        rank 0   F0 F1 F2 .  .  B0 F3 B1 .  B2 .  B3
        rank 1   .  F0 F1 .  B0 F2 B1 F3 B2 .  B3 .
        rank 2   .  .  F0 B0 F1 B1 F2 B2 F3 B3 .  .

    Rank i holds the activations of at most min(m, pp − i) microbatches.
    Source: Narayanan et al. 2021, arXiv:2104.04473, section 2.2.1.

    Raises: ScheduleError: if vp > 1.
    """
    _one_stage_a_rank("1f1b", vp)
    return [
        _alternate(
            [Action(rank, Kind.F, i) for i in range(m)],
            [Action(rank, Kind.B, i) for i in range(m)],
            warmup=pp - rank - 1,
        )
        for rank in range(pp)
    ]


def interleaved(pp: int, vp: int, m: int) -> Schedule:
    """1F1B with vp stages on a rank: pp microbatches go through one stage before the same pp go through the next.

    pp = 2, vp = 2, m = 2; rank 0 holds stages 0 and 2, rank 1 stages 1 and 3:

        rank 0   0F0 0F1 2F0 2F1 .   2B0 .   2B1 0B0 0B1
        rank 1   .   1F0 1F1 3F0 3B0 3F1 3B1 1B0 1B1 .

    A stage is 1/vp of a rank's layers, so the pipeline fills and drains in 1/vp of the time. Rank i warms up with
    2 (pp − i − 1) + (vp − 1) pp forwards and holds at most one more stage's activations than that.
    Source: Narayanan et al. 2021, arXiv:2104.04473, section 2.2.2; warm-up counts as in Megatron-LM.

    Raises: ScheduleError: if m does not divide by pp.
    """
    if m % pp:
        rule = f"must divide by pp = {pp} in the interleaved schedule"
        raise ScheduleError(Problem(f"microbatches = {m}", rule, f"use {(m // pp + 1) * pp}"))
    order = _in_rounds(pp, vp, m)
    return [
        _alternate(
            [Action(chunk * pp + rank, Kind.F, i) for chunk, i in order],
            [Action((vp - 1 - chunk) * pp + rank, Kind.B, i) for chunk, i in order],
            warmup=2 * (pp - rank - 1) + (vp - 1) * pp,
        )
        for rank in range(pp)
    ]


def forward_only(pp: int, vp: int, m: int) -> Schedule:
    """Forwards alone, for evaluation, in the interleaved order; any m.

    pp = 2, vp = 2, m = 3:

        rank 0   0F0 0F1 2F0 2F1 0F2 .   2F2 .
        rank 1   .   1F0 1F1 3F0 3F1 1F2 .   3F2
    """
    order = _in_rounds(pp, vp, m)
    return [[Action(chunk * pp + rank, Kind.F, i) for chunk, i in order] for rank in range(pp)]


SCHEDULES: Mapping[str, Callable[[int, int, int], Schedule]] = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "interleaved": interleaved,
}


def _alternate(forwards: list[Action], backwards: list[Action], warmup: int) -> list[Action]:
    """Run `warmup` forwards, then a forward and a backward in turn, then the backwards that are left."""
    warmup = min(warmup, len(forwards))
    steady = [action for pair in zip(forwards[warmup:], backwards) for action in pair]
    return forwards[:warmup] + steady + backwards[len(forwards) - warmup :]


def _in_rounds(pp: int, vp: int, m: int) -> list[tuple[int, int]]:
    """Return (chunk, microbatch) in the order a rank meets them: pp microbatches through each of its vp stages."""
    return [
        (chunk, microbatch)
        for first in range(0, m, pp)
        for chunk in range(vp)
        for microbatch in range(first, min(first + pp, m))
    ]


def _one_stage_a_rank(name: str, vp: int) -> None:
    if vp != 1:
        raise ScheduleError(Problem(f"vp = {vp}", f"the {name} schedule runs one stage a rank", "use vp = 1"))
