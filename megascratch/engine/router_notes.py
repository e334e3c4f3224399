"""What the routers of all ranks noted in a step: metrics, and the biases that even the load, outside the gradient."""

from collections.abc import Mapping

import torch
from torch import Tensor

from megascratch.config import ModelConfig
from megascratch.dist import comm
from megascratch.dist.mesh import Mesh
from megascratch.nn import Stage
from megascratch.nn.moe import MoE
from megascratch.nn.router import RouterReport


class RouterNotes:
    """Sums of `SequenceInfo.notes` over the micro-batches of a step.

    Args:
        model: resolved shape.
        mesh: this rank's place.
        tokens_divided: whether ranks of tp route different tokens (sequence parallelism).
    """

    def __init__(self, model: ModelConfig, mesh: Mesh, tokens_divided: bool) -> None:
        self.moe, self.mesh = model.moe, mesh
        self.axes = [mesh.pp, mesh.data, mesh.tp] if tokens_divided else [mesh.pp, mesh.data]
        self.rows = {name: row for row, name in enumerate(_sites(model))}
        self.sums: Tensor | None = None
        self.forget()

    def forget(self) -> None:
        """Begin a step."""
        if self.moe is not None:
            shape = (len(self.rows), self.moe.num_experts + RouterReport.n_scalars)
            self.sums = torch.zeros(shape, dtype=torch.float64, device=self.mesh.device)

    def add(self, notes: Mapping[str, Tensor]) -> None:
        """Take what one stage noted on one micro-batch."""
        for name, note in notes.items():
            assert self.sums is not None
            self.sums[self.rows[name]] += note

    def reports(self, loss_tokens: float) -> dict[str, RouterReport]:
        """Return one report a layer, by its name, over the global batch; the same on every rank."""
        if self.sums is None or self.moe is None:
            return {}
        total = self.sums
        for axis in self.axes:
            total = comm.sum_over(total, axis)
        topk = self.moe.router_topk
        return {name: RouterReport.of(total[row], topk, loss_tokens) for name, row in self.rows.items()}


def _sites(model: ModelConfig) -> list[str]:
    layers = range(model.n_layers + model.mtp_num_layers)
    return [f"layers.{i}.mlp" for i in layers if model.has_experts(i)]


def metrics_of(reports: Mapping[str, RouterReport]) -> dict[str, float]:
    """Return the metrics of every layer, and what the losses add up to."""
    metrics = {f"moe/{site}/{key}": value for site, report in reports.items() for key, value in report.metrics.items()}
    for key in ("aux_loss", "z_loss"):
        if reports:
            metrics[f"moe/{key}"] = sum(report.metrics[key] for report in reports.values())
    return metrics


def move_biases(stage: Stage, reports: Mapping[str, RouterReport]) -> None:
    """Move the biases of a stage's routers towards an even load."""
    for module in stage.modules():
        if isinstance(module, MoE):
            module.router.move_bias(reports[module.router.site].load)
