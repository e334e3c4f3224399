"""`Guard`: what a run does about steps that would harm it, and about ranks that differ or lag.

By hand, with `faults.spike_factor = 3` and losses 2.0 2.1 1.9 | 7.0: the median of the window is 2.0, and 7.0 is more
than three times as much, so step 4 is not taken: weights and optimizer stay as they are, the batch counts as consumed,
and 7.0 does not enter the window. A loss or gradient that is not finite is treated alike. After `faults.max_skipped`
such steps in a row the run saves, writes out the first batch of them, and ends.

Every rank decides on the same loss and norm, so none has to ask another.
"""

import json
import math
import socket
import statistics
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from safetensors.torch import save_file

from megascratch.data.microbatch import Microbatch
from megascratch.dist import comm
from megascratch.dist.agreement import tensor_digest
from megascratch.dist.layout import spec_of
from megascratch.dist.mesh import Axis
from megascratch.engine.engine import Engine, StepReport
from megascratch.errors import MegascratchError, Problem

_LEAST_SEEN = 8  # losses before one can be called a spike
_STATE = "guard"


class DivergedError(MegascratchError):
    """Too many steps in a row had to be skipped: training cannot go on."""


class ReplicaError(MegascratchError):
    """Ranks that should hold the same weights do not: memory or arithmetic of one of them failed."""


class Guard:
    """Watches over an engine as `[faults]` asks. Every rank calls each method at the same point.

    Args:
        engine: that is trained.
        folder: of the run, where batches are written out.
        console: rank-aware.
        state: of the run that goes on.
    """

    def __init__(self, engine: Engine, folder: Path, console: Console, state: Mapping[str, Any]) -> None:
        self.engine, self.folder, self.console = engine, folder, console
        self.config = engine.config.faults
        saved = state.get(_STATE, {})
        self._recent: deque[float] = deque(saved.get("recent", ()), maxlen=self.config.spike_window)
        self._in_a_row, self._skipped = int(saved.get("in_a_row", 0)), int(saved.get("skipped", 0))
        self._first: tuple[int, Sequence[Microbatch]] | None = None
        self._busy_s = 0.0

    def state(self) -> dict[str, Any]:
        """Return what the next step's decision depends on, for the checkpoint."""
        return {_STATE: {"recent": list(self._recent), "in_a_row": self._in_a_row, "skipped": self._skipped}}

    def loss_limit(self) -> float:
        """Return the largest loss with which the next step may be taken."""
        factor = self.config.spike_factor
        if factor is None or len(self._recent) < min(_LEAST_SEEN, self.config.spike_window):
            return math.inf
        return factor * statistics.median(self._recent)

    def after_step(self, report: StepReport, microbatches: Sequence[Microbatch], busy_s: float) -> dict[str, Any]:
        """Take note of a step.

        Args:
            report: what it did.
            microbatches: what it was trained on.
            busy_s: this rank's time without waiting for others.

        Returns: what there is to log.

        Raises: ReplicaError: on every rank, naming those that differ from the others.
        """
        step = self.engine.step
        if report.skipped:
            self._in_a_row, self._skipped = self._in_a_row + 1, self._skipped + 1
            if self._first is None:
                self._first = step, microbatches
        else:
            self._in_a_row, self._first = 0, None
            if math.isfinite(report.loss):  # a step without micro-batches has none
                self._recent.append(report.loss)
        self._busy_s += busy_s
        if self.config.stragglers_every and step % self.config.stragglers_every == 0:
            self._tell_stragglers()
        if self.config.replicas_every and step % self.config.replicas_every == 0:
            require_alike(self.engine)
        return {"skipped_steps": self._skipped}

    @property
    def must_stop(self) -> bool:
        """Whether too many steps in a row were skipped."""
        return self._in_a_row >= self.config.max_skipped

    def stop(self) -> DivergedError:
        """Write out the batch that began it, and return the error to end with, once a checkpoint is saved."""
        assert self._first is not None
        step, microbatches = self._first
        mesh = self.engine.mesh
        if mesh.tp.rank == mesh.pp.rank == mesh.cp.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = self.folder / f"batch_of_step_{step:08d}_dp_{mesh.dp.rank:04d}.safetensors"
            save_file(_tensors_of(microbatches), file)
        return DivergedError(
            f"loss or gradient were not finite, or spiked, in {self._in_a_row} steps in a row, from step {step} on,"
            f" whose batch is in {self.folder}: lower optim.lr, or resume from an earlier checkpoint"
        )

    def _tell_stragglers(self) -> None:
        mesh = self.engine.mesh
        own = json.dumps([socket.gethostname(), self._busy_s]).encode()
        self._busy_s = 0.0
        everyones = [json.loads(data) for data in comm.gather_bytes(own, mesh.world, mesh.device)]
        stages = [mesh.spec.coords(rank)["pp"] for rank in range(mesh.world.size)]
        for rank, (host, seconds) in enumerate(everyones):
            others = [s for other, (_, s) in enumerate(everyones) if other != rank and stages[other] == stages[rank]]
            usual = statistics.median(others) if others else seconds
            if seconds > self.config.straggler_ratio * usual:
                self.console.print(
                    f"rank {rank} on {host} is slow: {seconds / usual:.1f} times as long for its"
                    f" last {self.config.stragglers_every} steps as ranks with the same layers"
                )


def require_alike(engine: Engine) -> None:
    """Compare, bit for bit, weights and optimizer state of the ranks that hold the same ones. Every rank calls this.

    Raises: ReplicaError: on every rank. Of three or more, the majority is right; of two, both are named.
    """
    mesh = engine.mesh
    own: dict[str, tuple[Axis, dict[str, str]]] = {}
    for param in engine.parameters():
        if not engine.optimizer.divides(param):
            axis = mesh.axis(spec_of(param).data_axis)
            own.setdefault(axis.name, (axis, {}))[1][spec_of(param).name] = tensor_digest(param)
    for part in engine.optimizer.state_parts():
        axis, digests = own.setdefault(f"state {part.replicas.name}", (part.replicas, {}))
        digests[f"{part.kind} of {part.spec.name}"] = tensor_digest(part.tensor)
    problems = [problem for axis, digests in own.values() for problem in _minority(axis, digests, mesh.device)]
    found = dict.fromkeys(comm.gather_problems(problems, mesh.world, mesh.device))
    if found:
        lines = [f"{problem.value} {problem.rule}" for problem in found]
        more = f", and {len(lines) - 4} more" if len(lines) > 4 else ""
        remedy = "look after that machine; the run goes on from its last checkpoint"
        raise ReplicaError(f"after step {engine.step}: {'; '.join(lines[:4])}{more}: {remedy}")


def _minority(axis: Axis, digests: Mapping[str, str], device: Any) -> list[Problem]:
    """Return which ranks of an axis hold something else than most, and the first tensor that tells."""
    own = json.dumps([socket.gethostname(), digests]).encode()
    everyones = [json.loads(data) for data in comm.gather_bytes(own, axis, device)]
    problems = []
    for name in digests:
        votes = Counter(theirs[name] for _, theirs in everyones)
        right, count = votes.most_common(1)[0]
        for rank, (host, theirs) in enumerate(everyones):
            if len(votes) > 1 and (theirs[name] != right or 2 * count <= len(everyones)):
                rule = f"differs in {name} from {'the others' if 2 * count > len(everyones) else 'its replicas'}"
                problems.append(Problem(f"rank {axis.ranks[rank]} on {host}", rule))
    return problems


def _tensors_of(microbatches: Sequence[Microbatch]) -> dict[str, Any]:
    """Return a batch's tensors by micro-batch and name: 0.tokens, 0.labels, …"""
    tensors = {}
    for i, microbatch in enumerate(microbatches):
        for name, value in vars(microbatch).items():
            for key, tensor in value.items() if isinstance(value, Mapping) else [("", value)]:
                tensors[f"{i}.{name}.{key}".rstrip(".")] = tensor.contiguous().cpu()
    return tensors
