"""What a way of training brings to the one loop: where its batches come from, and what it minimises.

    method(config, mesh)     reads the user's data and finds what is wrong with it; no model exists yet
        └ begin(engine)      once the weights are there → Task(objective, train, validation)

A method is a function, so that it can be told to every process by name. What its model needs besides the decoder's
layers (a scalar head, adapters) stands in the configuration, which the engine, checkpoints and plans read alike.

A source of batches is asked for a step's batch when the step before it is done, unless it reads ahead. One that
generates its batches, or scores them with another model, does so then: the engine holds the weights of that moment.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from megascratch.config import Config
from megascratch.data.microbatch import Microbatch
from megascratch.dist.mesh import Mesh
from megascratch.engine.engine import Engine, StepReport
from megascratch.engine.objective import Objective
from megascratch.engine.totals import Totals


class Source(Protocol):
    """This data-parallel rank's micro-batches, a function of how many samples the run has consumed."""

    def steps(self, consumed_samples: int, n_steps: int, prefetch: int = 2) -> Iterator[list[Microbatch]]:
        """Yield the micro-batches of steps; none where a step is to learn nothing.

        Args:
            consumed_samples: in all steps before.
            n_steps: how many.
            prefetch: steps to read ahead, at most.
        """
        ...


def valid_loss(totals: Totals) -> dict[str, float]:
    """Name what validation found: the loss and every metric, as `valid_…`."""
    return {f"valid_{name}": value for name, value in {"loss": totals.loss, **totals.metrics}.items()}


@dataclass(frozen=True)
class Validation:
    """What is measured now and then while training.

    Attributes:
        batches: held-out; read from their beginning each time.
        n_steps: global batches.
        objective: its loss and metrics are averaged over all of them.
        describe: turns the means into what is logged.
    """

    batches: Source
    n_steps: int
    objective: Objective
    describe: Callable[[Totals], dict[str, float]] = valid_loss


@dataclass(frozen=True)
class Task:
    """What the loop trains an engine on.

    Attributes:
        objective: what is minimised.
        train: batches.
        validation: None without.
        resumable_every: steps between the points where a run can be resumed, because a batch serves several steps;
            saving, and ending on a signal, wait for one.
        keep: what each step keeps of what the objective computed of tokens, for `observe`; see `Engine.train_step`.
        observe: is told what a step did, and returns what else there is to log of it.
        companions: further engines in training (a critic), by name, which are saved beside this one.
        state: what else the next step depends on, as JSON, at the time of saving.
        restore: is given the saved state of the run; empty for a new one.
    """

    objective: Objective
    train: Source
    validation: Validation | None = None
    resumable_every: int = 1
    keep: str | None = None
    observe: Callable[[StepReport], Mapping[str, Any]] = lambda report: {}
    companions: Mapping[str, Engine] = field(default_factory=dict)
    state: Callable[[], dict[str, Any]] = dict
    restore: Callable[[Mapping[str, Any]], None] = lambda state: None


Begin = Callable[[Engine], Task]
Method = Callable[[Config, Mesh], Begin]
