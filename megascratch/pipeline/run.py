"""`run`: execute one rank's list of actions. The only loop there is; it knows no schedule's name.

What a rank keeps, and for how long:

    arrivals    an activation or gradient, from its receive until the forward or backward that uses it
    results     what a forward or backward leaves for the neighbouring stage, until its send
    graphs      the autograd graph of a forward, and its input, until the backward: these are the in-flight activations,
    owed        with the weight gradients that an I put off, until their W
    sending     transfers under way, a few at a time

A forward's output is not kept with its graph: once sent, it is free unless the graph itself saved it. On one rank
holding neighbouring stages a result becomes an arrival on the spot, so the serial model is the pipeline with pp = 1.

Receives are started where they stand in the list and waited for just before their consumer.
"""

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from megascratch.dist import comm
from megascratch.dist.mesh import Axis
from megascratch.nn import WeightGradients
from megascratch.pipeline.action import Action, Kind, delivery, input_of, partner
from megascratch.pipeline.schedule import Schedule

StageFn = Callable[[Tensor | None, int], Tensor]
"""A stage: (input activation or None on the first stage, microbatch) -> output activation, or on the last stage the
scalar to differentiate."""

# Sends a rank may have under way. Four keep a rank from waiting on its neighbour's jitter, and bound the buffers that
# sends hold to four activations, whatever the number of microbatches.
_MAX_SENDS = 4


@dataclass(frozen=True)
class Boundary:
    """The tensor between any two neighbouring stages: an activation forwards, its gradient backwards.

    Attributes:
        shape: of the activation, [s/tp, b, h] under sequence parallelism.
        dtype: of the activation and of its gradient.
        device: where it is computed.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class RunReport:
    """What one rank did.

    Attributes:
        executed: actions, in the order in which they were executed.
        peak_in_flight: most autograd graphs held at once, one for each stage and microbatch.
    """

    executed: tuple[Action, ...]
    peak_in_flight: int


def run(
    schedule: Schedule,
    stages: Mapping[int, StageFn],
    pp: Axis,
    boundary: Boundary,
    *,
    backward: bool = True,
    weight_gradients: WeightGradients | None = None,
    on_event: Callable[[Action, bool], None] | None = None,
) -> RunReport:
    """Execute this rank's actions; gradients are left on the parameters.

    Args:
        schedule: checked, communication included; its list for this rank is executed.
        stages: this rank's stages by their number.
        pp: pipeline axis; size 1 runs every stage here, without communication.
        boundary: shape, dtype and device of what passes between stages.
        backward: False runs forwards alone, without an autograd graph.
        weight_gradients: where the stages' layers put weight gradients off; None if the schedule splits no backward.
        on_event: called with (action, True) when an action starts, its inputs being here, and with (action, False)
            when it ends. Times on a GPU need events on the stream: the host only queues the work.
    """
    rank = _Rank(schedule, stages, pp, boundary, backward, weight_gradients)
    executed = []
    for action in schedule.actions[pp.rank]:
        rank.wait_for_input(action)
        if on_event is not None:
            on_event(action, True)
        rank.execute(action)
        executed.append(action)
        if on_event is not None:
            on_event(action, False)
    rank.finish_sends(left=0)
    return RunReport(tuple(executed), rank.peak_in_flight)


@dataclass
class _Rank:
    """State of one rank while it runs. Arrivals are filed under their receive, results under their send."""

    schedule: Schedule
    stages: Mapping[int, StageFn]
    pp: Axis
    boundary: Boundary
    backward: bool
    weight_gradients: WeightGradients | None
    arrivals: dict[Action, Tensor] = field(default_factory=dict)
    results: dict[Action, Tensor] = field(default_factory=dict)
    graphs: dict[tuple[int, int], tuple[Tensor | None, GradientEdge | None]] = field(default_factory=dict)
    owed: dict[tuple[int, int], list[Callable[[], None]]] = field(default_factory=dict)
    receiving: dict[Action, comm.Work] = field(default_factory=dict)
    sending: deque[tuple[comm.Work, Tensor]] = field(default_factory=deque)
    peak_in_flight: int = 0

    @property
    def n_stages(self) -> int:
        return self.schedule.n_stages

    def wait_for_input(self, action: Action) -> None:
        """Wait for the receive that a compute action uses."""
        receive = input_of(action, self.n_stages)
        if receive in self.receiving:
            with self.pp.waiting("receive"):
                self.receiving.pop(receive).wait()

    def execute(self, action: Action) -> None:
        match action.kind:
            case Kind.F:
                self.run_forward(action)
            case Kind.B:
                self.run_backward(action)
            case Kind.I:
                self.run_input_backward(action)
            case Kind.W:
                self.run_weight_backward(action)
            case Kind.SEND_F | Kind.SEND_B:
                self.send(action)
            case Kind.RECV_F | Kind.RECV_B:
                self.receive(action)

    def run_forward(self, action: Action) -> None:
        """Run a stage on its input, and keep the graph until the backward."""
        x = self.take_input(action)
        if x is not None:
            x.requires_grad_(self.backward)
        with torch.set_grad_enabled(self.backward):
            y = self.stages[action.stage](x, action.microbatch)
        if self.backward:
            # A first stage whose parameters are all frozen has nothing to differentiate by.
            output = get_gradient_edge(y) if y.requires_grad else None
            self.graphs[action.stage, action.microbatch] = (x, output)
            self.peak_in_flight = max(self.peak_in_flight, len(self.graphs) + len(self.owed))
        self.hand_over(action, y.detach())

    def run_backward(self, action: Action) -> None:
        """Differentiate a stage's output by its input and weights; the graph is freed."""
        grad = self.take_input(action)
        x, output = self.graphs.pop((action.stage, action.microbatch))
        if output is not None:
            torch.autograd.backward(output, grad)
        if x is not None:
            assert x.grad is not None, f"stage {action.stage} does not depend on its input"
            self.hand_over(action, x.grad)

    def run_input_backward(self, action: Action) -> None:
        """Differentiate a stage's output by its input; its layers put their weight gradients off."""
        assert self.weight_gradients is not None, f"{action} splits the backward of stages that cannot"
        with self.weight_gradients.collect() as owed:
            self.run_backward(action)
        self.owed[action.stage, action.microbatch] = owed

    def run_weight_backward(self, action: Action) -> None:
        """Compute the weight gradients that I put off, each freeing what it was computed from."""
        owed = self.owed.pop((action.stage, action.microbatch))
        while owed:
            owed.pop(0)()

    def take_input(self, action: Action) -> Tensor | None:
        """Return what the neighbouring stage left for an action; None at the end of the pipeline, where none is."""
        receive = input_of(action, self.n_stages)
        return None if receive is None else self.arrivals.pop(receive)

    def hand_over(self, action: Action, result: Tensor) -> None:
        """File a result under its send, or as an arrival if the stage that needs it lies on this rank."""
        transfer = delivery(action, self.n_stages)
        if transfer is None:
            return
        assert result.shape == self.boundary.shape, f"{action} gives {tuple(result.shape)}, not {self.boundary.shape}"
        assert result.dtype == self.boundary.dtype, f"{action} gives {result.dtype}, not {self.boundary.dtype}"
        send, receive = transfer
        if self.peer(receive) == self.pp.rank:
            self.arrivals[receive] = result
        else:
            self.results[send] = result

    def send(self, action: Action) -> None:
        """Start a send, once few enough are under way."""
        self.finish_sends(left=_MAX_SENDS - 1)
        result = self.results.pop(action).contiguous()
        work = comm.isend(result, self.pp, self.peer(partner(action)), self.tag(action))
        self.sending.append((work, result))  # the buffer must live as long as the transfer

    def receive(self, action: Action) -> None:
        """Start a receive into a new buffer."""
        send = partner(action)
        buffer = torch.empty(self.boundary.shape, dtype=self.boundary.dtype, device=self.boundary.device)
        self.receiving[action] = comm.irecv(buffer, self.pp, self.peer(send), self.tag(send))
        self.arrivals[action] = buffer

    def finish_sends(self, left: int) -> None:
        """Wait for the oldest sends until at most `left` are under way.

        The checker's rendezvous shows that waiting here, after their place in the list, cannot deadlock.
        """
        while len(self.sending) > left:
            work, _ = self.sending.popleft()
            with self.pp.waiting("send"):
                work.wait()

    def peer(self, action: Action) -> int:
        return self.schedule.rank_of(action)

    def tag(self, send: Action) -> int:
        """Return a number that no other send of the step has."""
        return 2 * (send.microbatch * self.n_stages + send.stage) + (send.kind is Kind.SEND_B)
