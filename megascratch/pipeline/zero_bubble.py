"""Zero-bubble schedules: the orders of forwards (F) and input gradients (I) into which weight gradients (W) are filled.

With the backward split, the previous stage waits for I alone, and W fills the time in which a rank would wait. In the
diagrams F, I and W take one unit of time each. All functions take pp, vp and m; see `schedules`.

The V-shaped ones place stage s on rank s or 2 pp − 1 − s, so that rank 0 holds the first stage and the last, and a rank
holds few activations of its early stage while it holds many of its late one: together the same on every rank.
"""

import itertools

from megascratch.pipeline.action import Action, Kind
from megascratch.pipeline.schedule import Lists


def zb_h1(pp: int, vp: int, m: int) -> Lists:
    """The order of 1F1B. W fills up to 1F1B's memory, pp, and leaves (pp − 1)(F + I − W) of its bubble: a third.

    pp = 2, m = 3:

        rank 0   F0 F1 .  I0 W0 F2 I1 W1 I2 W2
        rank 1   .  F0 I0 F1 I1 W0 F2 I2 W1 W2

    Source: Qi et al. 2023, arXiv:2401.10241, section 2.2.
    """
    return [_alternating(rank, m, warmup=pp - rank) for rank in range(pp)]


def zb_h2(pp: int, vp: int, m: int) -> Lists:
    """Warm up with so many forwards that no rank waits for its first I: bubble (pp − 1)(F + I − 2W), memory 2 pp − 1.

    pp = 2, m = 3:

        rank 0   F0 F1 F2 I0 W0 I1 W1 I2 W2
        rank 1   .  F0 I0 F1 I1 F2 I2 W0 W1 W2

    The ranks are busy from their first action to their last, but not all at once: what is left of the bubble lies at
    the ends of the step, and is gone only where a rank may start the next step before the others end this one.
    Source: Qi et al. 2023, arXiv:2401.10241, section 2.3.
    """
    return [_alternating(rank, m, warmup=2 * (pp - rank) - 1) for rank in range(pp)]


def _alternating(stage: int, m: int, warmup: int) -> list[Action]:
    """Run `warmup` forwards, then an I and a forward in turn, then the I that are left."""
    forwards = [Action(stage, Kind.F, i) for i in range(m)]
    backwards = [Action(stage, Kind.I, i) for i in range(m)]
    warmup = min(warmup, m)
    steady = [action for pair in zip(backwards, forwards[warmup:]) for action in pair]
    return forwards[:warmup] + steady + backwards[m - warmup :]


def zb_v(pp: int, vp: int, m: int) -> Lists:
    """No bubble within a rank's own window, at the memory of 1F1B: 2 pp activations of half-sized stages.

    pp = 2, m = 4; rank 0 holds stages 0 and 3, rank 1 stages 1 and 2:

        rank 0   0F0 0F1 0F2 3F0 3I0 3W0 3F1 3I1 3W1 0F3 0I0 …
        rank 1   .   1F0 2F0 1F1 2F1 2I0 2W0 1F2 …

    Warm-up, until the first I of stage 2 pp − 1 − i comes back to rank i, then all four kinds in turn.
    Source: Qi et al. 2024, arXiv:2405.15362, section 3 and appendix.
    """
    return [_zb_v_rank(pp, rank, m) for rank in range(pp)]


def _zb_v_rank(pp: int, rank: int, m: int) -> list[Action]:
    down, up = rank, 2 * pp - 1 - rank
    counts = {(stage, kind): 0 for stage in (down, up) for kind in (Kind.F, Kind.I)}
    # What must have been done once more often: the way is F down, F up, I up, I down.
    earlier = {(up, Kind.F): (down, Kind.F), (up, Kind.I): (up, Kind.F), (down, Kind.I): (up, Kind.I)}
    order: list[Action] = []

    def run(*steps: tuple[int, Kind]) -> None:
        """Add the next action of each step that there is one for."""
        for step in steps:
            if counts[step] < (counts[earlier[step]] if step in earlier else m):
                order.append(Action(*step, counts[step]))
                counts[step] += 1

    for _ in range(2 * (pp - rank) - 1):
        run((down, Kind.F))
    for _ in range(rank):
        run((up, Kind.F), (down, Kind.F))
    for _ in range(pp - rank):
        run((up, Kind.F), (up, Kind.I))
    while counts[up, Kind.F] < m:
        run((down, Kind.F), (down, Kind.I), (up, Kind.F), (up, Kind.I))
    while counts[down, Kind.I] < m:
        run((down, Kind.I), (up, Kind.I))
    return order


def v_half(pp: int, vp: int, m: int) -> Lists:
    """Half of 1F1B's memory: pp + 2 activations of half-sized stages, at about half of 1F1B's bubble.

    Source: Qi et al. 2024, arXiv:2405.15362, section 3.
    """
    return _repeat_block(pp, m, (2, 1, 2, 1))


def v_min(pp: int, vp: int, m: int) -> Lists:
    """A third of 1F1B's memory: about 2 pp / 3 + 2 activations of half-sized stages, at two thirds of its bubble.

    Source: Qi et al. 2024, arXiv:2405.15362, section 3.
    """
    return _repeat_block(pp, m, (1, 1, 1, 1))


def _repeat_block(pp: int, m: int, pace: tuple[int, int, int, int]) -> Lists:
    """Lay the same block of one microbatch's actions every six units, and read off each rank's order.

    A block says when each rank does F down, F up, I up and I down; `pace` is how many units lie between neighbouring
    ranks on each way, and a slow pace holds activations for longer. Two more units are left for W. V-Min, pp = 3, the
    block of microbatch 0, where the turns wait until no two of a rank's actions fall on the same unit of six:

        rank 0   0F0 .   .   .   .   5F0 .   .   5I0 …
        rank 1   .   1F0 .   .   4F0 .   .   .   .   4I0
        rank 2   .   .   2F0 3F0 .   .   .   .   .   .   3I0

    Executed, the actions of a rank keep this order and close up.
    """
    a, b, c, d = pace
    last = pp - 1
    for waits in sorted(itertools.product(range(6), repeat=3), key=sum):
        f_up = (a + b) * last + 1 + waits[0]  # on rank 0, as the others
        i_up = f_up + 1 + waits[1]
        i_down = i_up + (c + d) * last + 1 + waits[2]
        starts = [(a * rank, f_up - b * rank, i_up + c * rank, i_down - d * rank) for rank in range(pp)]
        if all(len({start % 6 for start in own}) == 4 for own in starts):
            break
    else:
        raise AssertionError(f"no block of pace {pace} fits pp = {pp}")
    lists = []
    for rank, own in enumerate(starts):
        up = 2 * pp - 1 - rank
        steps = zip(own, ((rank, Kind.F), (up, Kind.F), (up, Kind.I), (rank, Kind.I)))
        timed = sorted((start + 6 * i, Action(*step, i)) for start, step in steps for i in range(m))
        lists.append([action for _, action in timed])
    return lists
