"""A schedule with a fault is refused, with the reason."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megascratch.pipeline import SCHEDULES, Action, Kind, ScheduleError, add_communication, check
from megascratch.pipeline.action import needs


def lists(*texts):
    return [[Action.parse(word) for word in text.split()] for text in texts]


# 1F1B, pp = 2, m = 2, as the worked example of passes.py.
FIRST = "0F0 0SF0 0F1 0SF1 0RB0 0B0 0RB1 0B1"
LAST = "1RF0 1F0 1RF1 1B0 1SB0 1F1 1B1 1SB1"


def test_the_unharmed_schedule_passes():
    assert check(lists(FIRST, LAST), 2, 2).peak_in_flight == (2, 1)


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
        check(lists(first, last), 2, 2)


def test_ranks_that_wait_in_a_ring_deadlock():
    ring = lists("0F0 0SF0 0RB0 0B0", "1RF0 1F0 1RB0 1SF0 1B0 1SB0", "2RF0 2F0 2B0 2SB0")
    with pytest.raises(ScheduleError, match=r"rank 1: 1RB0 +waits for ever for 2SB0 of rank 2, which stands at 2RF0"):
        check(ring, 3, 1)


def test_all_faults_are_named_at_once_but_not_endlessly():
    with pytest.raises(ScheduleError, match=r"9 problems in the pipeline schedule(?s:.*)and 8 more"):
        check(lists("", ""), 2, 2)


def test_the_bound_on_memory_holds():
    schedule = add_communication(SCHEDULES["1f1b"](4, 1, 8), 4)
    assert check(schedule, 4, 8, max_in_flight=4).peak_in_flight == (4, 3, 2, 1)
    with pytest.raises(ScheduleError, match=r"rank 0 +must hold at most 3 activations at once, holds 4"):
        check(schedule, 4, 8, max_in_flight=3)


def test_a_split_backward_holds_its_activation_until_w():
    schedule = add_communication(lists("0F0 0F1 0I0 0F2 0W0 0B1 0B2", "1F0 1I0 1F1 1W0 1B1 1F2 1B2"), 2)
    assert " ".join(map(str, schedule[1])) == "1RF0 1F0 1RF1 1I0 1SB0 1F1 1W0 1RF2 1B1 1SB1 1F2 1B2 1SB2"
    assert check(schedule, 2, 3).peak_in_flight == (3, 2)


def test_an_evaluation_has_no_backward():
    with pytest.raises(ScheduleError, match=r"rank 0: 0B0 +has no place"):
        check(lists(FIRST, LAST), 2, 2, backward=False)


@pytest.mark.parametrize(
    ("first", "last", "reason"),
    [
        ("0F0 0B0 0F1 0B1", "1F0 1F1 1B0 1B1", r"rank 0: 0B0 +waits for ever for 0RB0(?s:.*)rank 1: 1F1 .* for 1RF1"),
        ("0F0 0F1 0B0 0B1", "1F0 1B1 1B0", r"rank 1: 1B1 +waits for ever for 1F1"),
        ("0F0 0SF0 0B0", "1RF0 1F0 1B0", r"0SF0 +a schedule lists compute only"),
        ("0F0 2F0 0B0", "1F0 1B0", r"rank 0: 2F0 +waits for ever for 2RF0"),
    ],
)
def test_lists_that_cannot_be_executed_get_no_communication(first, last, reason):
    with pytest.raises(ScheduleError, match=reason):
        check(add_communication(lists(first, last), 2), 2, 2)


SIZES = {"gpipe": (3, 1, 4), "1f1b": (4, 1, 6), "interleaved": (2, 3, 4)}


def needed_on_the_rank(action, n_stages):
    """What must stand before an action in the list of its own rank."""
    if action.kind.is_compute:
        return needs(action, n_stages)
    producer = {Kind.SEND_F: Kind.F, Kind.SEND_B: Kind.B}.get(action.kind)
    return [Action(action.stage, producer, action.microbatch)] if producer else []


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_any_mutation_is_refused(data):
    """Drop an action, double it, or move it before something that it needs."""
    name = data.draw(st.sampled_from(sorted(SIZES)))
    pp, vp, m = SIZES[name]
    schedule = add_communication(SCHEDULES[name](pp, vp, m), pp * vp)
    actions = data.draw(st.sampled_from(schedule))
    mutation = data.draw(st.sampled_from(["drop", "double", "move"]))
    if mutation == "move":
        action = data.draw(st.sampled_from([a for a in actions if needed_on_the_rank(a, pp * vp)]))
        before = data.draw(st.sampled_from(needed_on_the_rank(action, pp * vp)))
        actions.remove(action)
        actions.insert(actions.index(before), action)
    else:
        action = data.draw(st.sampled_from(actions))
        if mutation == "drop":
            actions.remove(action)
        else:
            actions.insert(data.draw(st.integers(0, len(actions))), action)
    with pytest.raises(ScheduleError, match="stands before" if mutation == "move" else "exactly once"):
        check(schedule, pp * vp, m)
