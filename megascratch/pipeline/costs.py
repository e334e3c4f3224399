"""`Costs`: how long each action takes. Any unit will do: schedules and bubbles depend on ratios alone."""

from dataclasses import dataclass

from megascratch.pipeline.action import Action, Kind


@dataclass(frozen=True)
class Costs:
    """Times of one stage, and of one transfer between ranks.

    Attributes:
        forward, input_grad, weight_grad: of F, I and W; a whole B takes I and W.
        transfer: from the end of a computation until its result is on another rank.
        shares: of each stage in the work, 1 for an average one; empty where all stages are alike.
    """

    forward: float = 1.0
    input_grad: float = 1.0
    weight_grad: float = 1.0
    transfer: float = 0.0
    shares: tuple[float, ...] = ()

    def of(self, action: Action) -> float:
        """Return the time of an action on its rank; sends and receives take none of it."""
        match action.kind:
            case Kind.F:
                time = self.forward
            case Kind.B:
                time = self.input_grad + self.weight_grad
            case Kind.I:
                time = self.input_grad
            case Kind.W:
                time = self.weight_grad
            case _:
                return 0.0
        return time * self.shares[action.stage] if self.shares else time


UNIT = Costs()
