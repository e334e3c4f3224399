"""A schedule with a fault is refused, with the reason."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megascratch.pipeline import (
    SCHEDULES,
    Action,
    Costs,
    Kind,
    Schedule,
    ScheduleError,
    add_communication,
    check,
    looped,
    make_schedule,
)
from megascratch.pipeline.action import needs


def schedule_of(*texts, m):
    """One stage a rank."""
    return Schedule([[Action.parse(word) for word in text.split()] for text in texts], looped(len(texts), 1), m)


# 1F1B, pp = 2, m = 2, as the worked example of passes.py.
FIRST = "0F0 0SF0 0F1 0SF1 0RB0 0B0 0RB1 0B1"
LAST = "1RF0 1F0 1RF1 1B0 1SB0 1F1 1B1 1SB1"


def test_the_unharmed_schedule_passes():
    assert check(schedule_of(FIRST, LAST, m=2)).peak_in_flight == (2, 1)


@pytest.mark.parametrize(
    ("first", "last", "reason"),
    [
        pytest.param(FIRST.replace("0B1", ""), LAST, r"0B1 +must stand on rank 0 exactly once, not 0", id="dropped"),
        pytest.param(FIRST + " 0B1", LAST, r"0B1 +must stand on rank 0 exactly once, not 2 times", id="doubled"),
        pytest.param(FIRST + " 1B1", LAST, r"rank 0: 1B1 +belongs on rank 1", id="wrong rank"),
        pytest.param(FIRST + " 2F0", LAST, r"rank 0: 2F0 +has no place among 2 stages and 2 micro", id="no such stage"),
        pytest.param(FIRST + " 0F2", LAST, r"rank 0: 0F2 +has no place among 2 stages", id="no such microbatch"),
        pytest.param(FIRST, LAST.replace("1RF1", ""), r"1RF1 .*not 0 times; it pairs with 0SF1", id="send alone"),
        pytest.param(FIRST.replace("0SF1", ""), LAST, r"0SF1 .*not 0 times; it pairs with 1RF1", id="receive alone"),
        pytest.param(FIRST.replace("0B1", "0B1 0W1"), LAST, r"rank 0: 0B1 +has no place", id="B beside W"),
        pytest.param(
            FIRST,
            LAST.replace("1RF0 1F0", "1F0 1RF0"),
            r"rank 1: 1F0 +stands before 1RF0, which it needs",
            id="before its input",
        ),
        pytest.param(
            FIRST,
            LAST.replace("1B0 1SB0 1F1 1B1", "1B0 1SB0 1B1 1F1"),
            r"rank 1: 1B1 +stands before 1F1, which it needs",
            id="backward before forward",
        ),
        pytest.param(
            FIRST,
            LAST.replace("1B0 1SB0", "1SB0 1B0"),
            r"rank 1: 1SB0 +stands before what it sends is computed",
            id="sent before computed",
        ),
        pytest.param(
            "0F0 0F1 0SF1 0SF0 0RB0 0B0 0RB1 0B1",
            LAST,
            r"rank 0: 0SF1 +waits for ever for 1RF1 of rank 1, which stands at 1RF0",
            id="deadlock",
        ),
    ],
)
def test_faults_are_refused(first, last, reason):
    with pytest.raises(ScheduleError, match=reason):
        check(schedule_of(first, last, m=2))


def test_ranks_that_wait_in_a_ring_deadlock():
    ring = schedule_of("0F0 0SF0 0RB0 0B0", "1RF0 1F0 1RB0 1SF0 1B0 1SB0", "2RF0 2F0 2B0 2SB0", m=1)
    with pytest.raises(ScheduleError, match=r"rank 1: 1RB0 +waits for ever for 2SB0 of rank 2, which stands at 2RF0"):
        check(ring)


def test_all_faults_are_named_at_once_but_not_endlessly():
    with pytest.raises(ScheduleError, match=r"9 problems in the pipeline schedule(?s:.*)and 8 more"):
        check(schedule_of("", "", m=2))


def test_the_bound_on_memory_holds():
    schedule = add_communication(make_schedule("1f1b", 4, 1, 8))
    assert check(schedule, max_in_flight=4).peak_in_flight == (4, 3, 2, 1)
    with pytest.raises(ScheduleError, match=r"rank 0 +must hold at most 3 activations at once, holds 4"):
        check(schedule, max_in_flight=3)


def test_a_split_backward_holds_its_activation_until_w():
    schedule = add_communication(schedule_of("0F0 0F1 0I0 0F2 0W0 0B1 0B2", "1F0 1I0 1F1 1W0 1B1 1F2 1B2", m=3))
    assert " ".join(map(str, schedule.actions[1])) == "1RF0 1F0 1RF1 1I0 1SB0 1F1 1W0 1RF2 1B1 1SB1 1F2 1B2 1SB2"
    assert check(schedule).peak_in_flight == (3, 2)


def test_an_evaluation_has_no_backward():
    with pytest.raises(ScheduleError, match=r"rank 0: 0B0 +has no place"):
        check(schedule_of(FIRST, LAST, m=2), backward=False)


@pytest.mark.parametrize(
    ("first", "last", "reason"),
    [
        ("0F0 0B0 0F1 0B1", "1F0 1F1 1B0 1B1", r"rank 0: 0B0 +waits for ever for 0RB0(?s:.*)rank 1: 1F1 .* for 1RF1"),
        ("0F0 0F1 0B0 0B1", "1F0 1B1 1B0", r"rank 1: 1B1 +waits for ever for 1F1"),
        ("0F0 0SF0 0B0", "1RF0 1F0 1B0", r"0SF0 +a schedule lists compute only"),
        ("0F0 1F0 0B0", "1B0", r"rank 0: 1F0 +belongs on rank 1"),
    ],
)
def test_lists_that_cannot_be_executed_get_no_communication(first, last, reason):
    with pytest.raises(ScheduleError, match=reason):
        check(add_communication(schedule_of(first, last, m=2)))


def needed_on_the_rank(action, n_stages):
    """What must stand before an action in the list of its own rank."""
    if action.kind.is_compute:
        return needs(action, n_stages)
    producers = {Kind.SEND_F: [Kind.F], Kind.SEND_B: [Kind.B, Kind.I]}.get(action.kind, [])
    return [Action(action.stage, producer, action.microbatch) for producer in producers]


times = st.floats(0.05, 4.0)


@st.composite
def schedules(draw, largest=8):
    """Any family, in any size that it can be had in, by any costs."""
    name = draw(st.sampled_from(sorted(SCHEDULES)))
    pp = draw(st.integers(1, largest))
    pp += pp % 2 if name == "dualpipe" else 0
    vp = SCHEDULES[name].n_chunks or draw(st.integers(1, 4))
    m = draw(st.integers(2 * pp if "dualpipe" in name else 1, 3 * largest))
    m += m % 2 if name == "dualpipe" else 0
    costs = Costs(draw(times), draw(times), draw(times), draw(st.floats(0.0, 2.0)))
    return name, add_communication(make_schedule(name, pp, vp, m, costs))


@given(schedules())
@settings(max_examples=100, deadline=None)
def test_any_generated_schedule_passes_within_its_limit(drawn):
    name, schedule = drawn
    limit = SCHEDULES[name].limit
    check(schedule, limit(len(schedule.actions)) if limit else None)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_any_mutation_is_refused(data):
    """Drop an action, double it, or move it before something that it needs."""
    _, schedule = data.draw(schedules(largest=4))
    actions = data.draw(st.sampled_from([own for own in schedule.actions if own]))
    mutation = data.draw(st.sampled_from(["drop", "double", "move"]))
    action = data.draw(st.sampled_from(actions))
    standing = [need for need in needed_on_the_rank(action, schedule.n_stages) if need in actions]
    if mutation == "move" and standing:
        before = data.draw(st.sampled_from(standing))
        actions.remove(action)
        actions.insert(actions.index(before), action)
        reason = "stands before"
    elif mutation == "double":
        actions.insert(data.draw(st.integers(0, len(actions))), action)
        reason = "exactly once, not 2 times|has no place"
    else:
        actions.remove(action)
        # Without its I or its W, a split backward is still one; without both it would be a whole one that is missing.
        reason = "exactly once, not 0 times"
    with pytest.raises(ScheduleError, match=reason):
        check(schedule)
