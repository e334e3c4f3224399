"""Actions print, parse, order, and know what they need."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megascratch.pipeline.action import Action, Kind, ScheduleError, delivery, needs, partner

numbers = st.integers(0, 10**9 - 1)
actions = st.builds(Action, numbers, st.sampled_from(Kind), numbers)


@given(actions)
def test_print_and_parse_round_trip(action):
    assert Action.parse(str(action)) == action


def test_printed_forms():
    assert str(Action(2, Kind.F, 0)) == "2F0"
    assert str(Action(11, Kind.SEND_B, 3)) == "11SB3"
    assert Action.parse("1RF12") == Action(1, Kind.RECV_F, 12)


@pytest.mark.parametrize(
    "text", ["", "F0", "2F", "2X0", "2f0", "-1F0", "2F0 ", "2 F0", "2F0\n", "٢F0", "2.0F1", "0SF", "1" * 5000 + "F0"]
)
def test_bad_text_is_refused(text):
    with pytest.raises(ScheduleError, match="must be a stage, a kind") as error:
        Action.parse(text)
    assert len(str(error.value)) < 300


def test_actions_order_and_hash():
    early, late = Action(0, Kind.F, 1), Action(0, Kind.F, 2)
    assert early < late < Action(1, Kind.B, 0)
    assert len({early, Action(0, Kind.F, 1)}) == 1


def test_needs_and_delivery_between_three_stages():
    def texts(found):
        return [str(action) for action in found]

    assert texts(needs(Action.parse("0F5"), 3)) == []
    assert texts(needs(Action.parse("1F5"), 3)) == ["1RF5"]
    assert texts(needs(Action.parse("1B5"), 3)) == ["1F5", "1RB5"]
    assert texts(needs(Action.parse("2I5"), 3)) == ["2F5"]
    assert texts(needs(Action.parse("1W5"), 3)) == ["1I5"]
    assert texts(delivery(Action.parse("1F5"), 3)) == ["1SF5", "2RF5"]
    assert texts(delivery(Action.parse("1I5"), 3)) == ["1SB5", "0RB5"]
    assert delivery(Action.parse("2F5"), 3) is None
    assert delivery(Action.parse("0B5"), 3) is None
    assert delivery(Action.parse("1W5"), 3) is None


@pytest.mark.parametrize("text", ["1SF0", "1RF0", "1SB0", "1RB0"])
def test_partner_is_mutual(text):
    action = Action.parse(text)
    assert partner(partner(action)) == action
    assert abs(partner(action).stage - action.stage) == 1
