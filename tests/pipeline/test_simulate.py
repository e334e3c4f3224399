"""Times on paper: bubbles equal their closed forms, the critical path explains the makespan, and it is quick."""

import itertools
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megascratch.pipeline import (
    SCHEDULES,
    Costs,
    add_communication,
    check,
    critical_path,
    make_schedule,
    parse_schedule,
    simulate,
)

LARGE = [(64, 512), (32, 128), (16, 64), (8, 24), (4, 8), (2, 4), (1, 3)]


def timeline(name, pp, m, costs=Costs(), vp=None):
    return simulate(make_schedule(name, pp, vp or SCHEDULES[name].n_chunks, m, costs), costs)


def idle(times, m, costs):
    """Time that the rank with the longest window waits in."""
    work = m * (costs.forward + costs.input_grad + costs.weight_grad)
    return work * times.bubble / (1 - times.bubble)


def test_the_worked_example():
    times = simulate(make_schedule("1f1b", 2, 1, 2))
    assert [(str(e.action), e.start, e.end) for e in times.events[0]] == [
        ("0F0", 0, 1),
        ("0F1", 1, 2),
        ("0B0", 4, 6),
        ("0B1", 7, 9),
    ]
    assert [(str(e.action), e.start) for e in times.events[1]] == [("1F0", 1), ("1B0", 2), ("1F1", 4), ("1B1", 5)]
    assert (times.makespan, times.bubble, times.step_bubble) == (9, 1 - 6 / 9, 1 - 12 / 18)


@pytest.mark.parametrize(("pp", "m"), LARGE)
def test_1f1b_has_the_closed_form(pp, m):
    assert timeline("1f1b", pp, m).bubble == pytest.approx((pp - 1) / (m + pp - 1))


@pytest.mark.parametrize(("pp", "m"), [*LARGE, (4, 9), (3, 8), (16, 70)])
def test_interleaving_divides_the_ideal_time_by_vp(pp, m):
    for vp in (2, 3) if pp < 64 else (2,):
        bubble = timeline("interleaved", pp, m, vp=vp).bubble
        assert bubble / (1 - bubble) == pytest.approx((pp - 1) / (vp * m))


@pytest.mark.parametrize(("pp", "m"), LARGE)
def test_zb_h1_has_a_third_of_the_bubble_of_1f1b(pp, m):
    assert idle(timeline("zb-h1", pp, m), m, Costs()) == pytest.approx((pp - 1) * (1 + 2) / 3)


@pytest.mark.parametrize("costs", [Costs(1, 1.2, 0.8), Costs(1, 1, 0.7), Costs(2, 2.5, 2)])
def test_zb_h1_has_its_closed_form_for_other_costs(costs):
    """(pp − 1)(F + I − W), for W no longer than F and I: what it can fill."""
    closed = 3 * (costs.forward + costs.input_grad - costs.weight_grad)
    assert idle(timeline("zb-h1", 4, 16, costs), 16, costs) == pytest.approx(closed, rel=0.25)


@pytest.mark.parametrize(
    ("name", "pp", "m"),
    [("zb-v", 64, 512), *itertools.product(["zb-h2", "zb-v", "dualpipe-v", "dualpipe"], [32, 8, 2], [64])],
)
def test_schedules_without_a_bubble(name, pp, m):
    assert timeline(name, pp, m).bubble == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(("pp", "m", "published"), [(8, 24, 0.027), (16, 64, 0.022), (32, 128, 0.023)])
def test_zb_v_with_transfers_is_near_the_published_bubble(pp, m, published):
    """Qi et al. 2024, F = I = W, transfers of a tenth of that."""
    assert timeline("zb-v", pp, m, Costs(transfer=0.1)).bubble == pytest.approx(published, abs=0.002)


@pytest.mark.parametrize(("pp", "m"), [(8, 24), (16, 64), (32, 128)])
def test_less_memory_costs_a_part_of_the_bubble_of_1f1b(pp, m):
    """V-Half about half of it, V-Min about two thirds; their stages are half as long."""
    whole = (pp - 1) * 3
    half, third = (idle(timeline(name, pp, 2 * m), 4 * m, Costs()) / 2 for name in ("v-half", "v-min"))
    assert 0.4 < half / whole < 0.55
    assert 0.55 < third / whole < 0.7


def test_where_ranks_wait_for_each_other_zb_h2_gains_nothing_over_zb_h1():
    """The first forward reaches the last rank after (pp − 1) F, whatever the schedule."""
    assert timeline("zb-h2", 8, 24).makespan == timeline("zb-h1", 8, 24).makespan == 3 * 24 + 7


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_step_takes_no_less_than_its_work_and_no_more_than_all_of_it(data):
    costs = Costs(*data.draw(st.tuples(*[st.floats(0.1, 3.0)] * 4)))
    name = data.draw(st.sampled_from(sorted(SCHEDULES)))
    pp, m = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 9))
    if "dual" in name:
        pp, m = 2 * pp, 4 * pp + 2 * m
    schedule = add_communication(make_schedule(name, pp, SCHEDULES[name].n_chunks or 2, m, costs))
    times = simulate(schedule, costs)
    assert [[event.action for event in own] for own in times.events] == [list(own) for own in schedule.actions]
    assert times.peak_in_flight == check(schedule).peak_in_flight
    for own in times.computes():
        assert all(before.end <= after.start for before, after in itertools.pairwise(own))
    path = critical_path(times, schedule, costs)
    assert path[0].start == 0
    assert path[-1].end == pytest.approx(times.makespan)
    for before, after in itertools.pairwise(path):
        gap = after.start - before.end
        assert gap == pytest.approx(0, abs=1e-6) or gap == pytest.approx(costs.transfer, abs=1e-6)


def test_uneven_stages_take_their_share():
    schedule = parse_schedule("0F0 0F1 0B0 0B1\n1F0 1B0 1F1 1B1")
    times = simulate(schedule, Costs(shares=(0.5, 2.0)))
    assert [event.end - event.start for event in times.events[0]] == [0.5, 0.5, 1.0, 1.0]
    assert [event.end - event.start for event in times.events[1]] == [2.0, 4.0, 2.0, 4.0]


@pytest.mark.parametrize("name", SCHEDULES)
def test_it_is_quick(name):
    """32 ranks and 128 microbatches in 0.3 s; processor time, since other work may share the machine."""
    schedule = add_communication(make_schedule(name, 32, SCHEDULES[name].n_chunks or 2, 128))
    took = []
    while len(took) < 5 and min(took, default=1.0) > 0.3:
        start = time.thread_time()
        simulate(schedule)
        took.append(time.thread_time() - start)
    assert min(took) <= 0.3
