"""What the last stage found, told to every rank: sums over a global batch, and results of each micro-batch.

Only the last stage sees an objective's outputs, and which metrics it has: names and shapes travel before numbers.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from megascratch.dist import comm
from megascratch.dist.mesh import Mesh
from megascratch.dist.sums import exact_sum
from megascratch.engine.objective import Loss, Ratio
from megascratch.optim import StepResult

# Names of sums that no metric has: a metric's weight is called _WEIGHT and its name.
_LOSS, _WEIGHT = "", "\t"


@dataclass(frozen=True)
class Totals:
    """Means over a global batch, equal on every rank, with the weights that divided them.

    Attributes:
        loss, weight: of what is minimised.
        metrics: without those that a batch has nothing of.
        weights: of each metric.
    """

    loss: float
    weight: float
    metrics: dict[str, float]
    weights: dict[str, float]

    @classmethod
    def over(cls, batches: Sequence["Totals"]) -> "Totals":
        """Return the means over several batches together, which is no mean of their means."""
        weight = sum(one.weight for one in batches)
        weights: dict[str, float] = {}
        metrics: dict[str, float] = {}
        for one in batches:
            for name, value in one.metrics.items():
                weights[name] = weights.get(name, 0.0) + one.weights[name]
                metrics[name] = metrics.get(name, 0.0) + value * one.weights[name]
        loss = sum(one.loss * one.weight for one in batches) / weight
        return cls(loss, weight, {name: value / weights[name] for name, value in metrics.items()}, weights)


Sums = dict[str, list[Tensor]]
"""By name, what each micro-batch has added, a float64 scalar; they are added up at the end, to the same bits always."""


def add_up(sums: Sums, loss: Loss) -> None:
    """Note a micro-batch's sums, in float64."""
    entries = {_LOSS: loss.total, _WEIGHT: loss.weight}
    for name, value in loss.metrics.items():
        ratio = value if isinstance(value, Ratio) else Ratio(value, loss.weight)
        entries |= {name: ratio.total, f"{_WEIGHT}{name}": ratio.weight}
    for name, value in entries.items():
        sums.setdefault(name, []).append(value.detach().double())


@dataclass(frozen=True)
class DeviceTotals:
    """Sums over a global batch, equal on every rank, on the device.

    Attributes:
        names: those of `Sums`.
        values: [n] float64, one a name.
    """

    names: list[str]
    values: Tensor

    @property
    def weight(self) -> Tensor:
        """Of what is minimised, a scalar."""
        return self.values[self.names.index(_WEIGHT)]

    @property
    def loss(self) -> Tensor:
        """Its mean, a scalar."""
        return self.values[self.names.index(_LOSS)] / self.weight

    def means(self, values: Sequence[float]) -> Totals:
        """Divide each sum by its weight, once `values` were read."""
        totals = dict(zip(self.names, values, strict=True))
        loss, weight = totals.pop(_LOSS), totals.pop(_WEIGHT)
        weights = {name.removeprefix(_WEIGHT): value for name, value in totals.items() if name.startswith(_WEIGHT)}
        weights = {name: value for name, value in weights.items() if value != 0}
        return Totals(loss / weight, weight, {name: totals[name] / weights[name] for name in weights}, weights)


class Queued(NamedTuple):
    """What a training step will have found, once the device has done it.

    Attributes:
        totals: sums over the global batch.
        kept: of micro-batches by number, on the last stage, what was asked for.
        result: of the update.
    """

    totals: DeviceTotals
    kept: Mapping[int, Tensor]
    result: StepResult

    def read(self) -> tuple[Totals, float, bool]:
        """Wait for it: the means, the gradient's norm, and whether the step was taken."""
        norm, taken = self.result
        *values, grad_norm, was_taken = torch.cat([self.totals.values, torch.stack([norm, taken.double()])]).tolist()
        return self.totals.means(values), grad_norm, was_taken > 0


def totals_of(sums: Mapping[str, list[Tensor]], mesh: Mesh) -> DeviceTotals:
    """Add the sums up over micro-batches and data-parallel ranks, and tell every rank.

    Without a pipeline nothing is asked of the device.

    Args:
        sums: see `Sums`.
        mesh: this rank's place.
    """
    names = list(sums)
    if mesh.pp.size > 1:
        everyone = comm.gather_bytes("\n".join(names).encode(), mesh.pp, mesh.device)
        names = max(everyone, key=len).decode().split("\n")  # empty where there is no last stage
    nothing = torch.zeros(1, dtype=torch.float64, device=mesh.device)
    values = pad_sequence([torch.stack(sums[name]) if name in sums else nothing for name in names], batch_first=True)
    return DeviceTotals(names, exact_sum(values, mesh.pp, mesh.data))


def tell_pipeline(results: Mapping[int, Tensor], n: int, mesh: Mesh) -> list[Tensor]:
    """Give every rank of pp the results 0 … n − 1, each of which one of them has; all have one shape and dtype."""
    if mesh.pp.size == 1:
        return [results[index] for index in range(n)]
    own = next(iter(results.values()), None)
    said = b"" if own is None else json.dumps([str(own.dtype).removeprefix("torch."), *own.shape]).encode()
    dtype, *shape = json.loads(max(comm.gather_bytes(said, mesh.pp, mesh.device), key=len))
    everyones = torch.zeros(n, *shape, dtype=getattr(torch, dtype), device=mesh.device)
    for index, result in results.items():
        everyones[index] = result
    return list(comm.sum_over(everyones, mesh.pp))
