"""`Action`: what a pipeline rank does next. A schedule is one list of them a rank; everything else interprets it.

    kind      what the rank does for one stage and one microbatch
    F         forward
    B         backward: gradients of the stage's input and of its weights
    I, W      the two halves of B: the input's gradient, which the previous stage waits for; the weights' gradient
    SF, RF    send this stage's activation to the next stage; receive this stage's input from the previous one
    SB, RB    send the gradient of this stage's input to the previous stage; receive that of its output from the next

An action prints as stage, kind, microbatch, and parses from the same text. Microbatch 0 going through two stages on
two ranks, and back:

    rank 0   0F0 0SF0             0RB0 0B0        2F0 is the forward of stage 2 on microbatch 0
    rank 1       1RF0 1F0 1B0 1SB0                1RF0 receives the input of stage 1
"""

import re
from enum import StrEnum
from typing import NamedTuple

from megascratch.errors import Problem, UserError


class ScheduleError(UserError):
    """A pipeline schedule cannot be written, read or executed."""


class Kind(StrEnum):
    """What an action does; the value is its short form in text."""

    F = "F"
    B = "B"
    I = "I"
    W = "W"
    SEND_F = "SF"
    RECV_F = "RF"
    SEND_B = "SB"
    RECV_B = "RB"

    __hash__ = str.__hash__  # in C; Enum's own is Python, and checking 10⁵ actions hashes millions

    @property
    def is_compute(self) -> bool:
        return len(self) == 1  # of the text; `value` is a slow attribute


# Nine digits are more than any run has, and keep a hostile schedule file from spelling numbers of a million digits.
_TEXT = re.compile(rf"([0-9]{{1,9}})({'|'.join(Kind)})([0-9]{{1,9}})")


class Action(NamedTuple):
    """One step of one rank: `kind` for `stage` on `microbatch`, both counted from 0."""

    stage: int
    kind: Kind
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"

    @classmethod
    def parse(cls, text: str) -> "Action":
        """Read one action from its printed form, as `2F0` or `1RB3`.

        Raises: ScheduleError: if the text is not an action.
        """
        match = _TEXT.fullmatch(text)
        if match is None:
            raise ScheduleError(
                Problem(
                    f"action {text[:40]!r}",
                    f"must be a stage, a kind ({', '.join(Kind)}) and a microbatch",
                    "write 2F0 for the forward of stage 2 on microbatch 0",
                )
            )
        stage, kind, microbatch = match.groups()
        return cls(int(stage), Kind(kind), int(microbatch))


def input_of(action: Action, n_stages: int) -> Action | None:
    """Return the receive of what a compute action takes from a neighbouring stage, or None where it takes nothing."""
    stage, kind, microbatch = action
    if kind is Kind.F and stage > 0:
        return Action(stage, Kind.RECV_F, microbatch)
    if (kind is Kind.B or kind is Kind.I) and stage < n_stages - 1:
        return Action(stage, Kind.RECV_B, microbatch)
    return None


def needs(action: Action, n_stages: int) -> list[Action]:
    """Return what must have happened on the same rank before a compute action can run.

    An input counts as received (RF, RB) also when the neighbouring stage lies on the same rank and hands it over.
    """
    assert action.kind.is_compute, f"{action} computes nothing"
    earlier = {Kind.B: Kind.F, Kind.I: Kind.F, Kind.W: Kind.I}.get(action.kind)
    own = [Action(action.stage, earlier, action.microbatch)] if earlier else []
    receive = input_of(action, n_stages)
    return own if receive is None else [*own, receive]


def delivery(action: Action, n_stages: int) -> tuple[Action, Action] | None:
    """Return the send and the receive that carry a compute action's result to the stage that needs it, if one does."""
    stage, microbatch = action.stage, action.microbatch
    if action.kind is Kind.F and stage < n_stages - 1:
        return Action(stage, Kind.SEND_F, microbatch), Action(stage + 1, Kind.RECV_F, microbatch)
    if action.kind in (Kind.B, Kind.I) and stage > 0:
        return Action(stage, Kind.SEND_B, microbatch), Action(stage - 1, Kind.RECV_B, microbatch)
    return None


def partner(action: Action) -> Action:
    """Return the receive of a send, or the send of a receive."""
    stage, microbatch = action.stage, action.microbatch
    match action.kind:
        case Kind.SEND_F:
            return Action(stage + 1, Kind.RECV_F, microbatch)
        case Kind.RECV_F:
            return Action(stage - 1, Kind.SEND_F, microbatch)
        case Kind.SEND_B:
            return Action(stage - 1, Kind.RECV_B, microbatch)
        case Kind.RECV_B:
            return Action(stage + 1, Kind.SEND_B, microbatch)
        case _:
            raise AssertionError(f"{action} communicates nothing")
