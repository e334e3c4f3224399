"""Where a module's parameters and tokens lie: one value for all layers, so that constructors stay about shapes."""

from dataclasses import dataclass, field

import torch
from torch import nn

from megascratch.config import Config
from megascratch.dist.layout import Init, Matrices, Split, parameter
from megascratch.dist.mesh import Axis, Mesh
from megascratch.nn.activations import Activations
from megascratch.nn.fp8 import Recipe, Tensorwise
from megascratch.nn.weight_gradients import WeightGradients

# By the names that `train.dtype` uses.
DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.bfloat16,  # of parameters and activations; products alone are in 8 bits
}


@dataclass(frozen=True)
class Placement:
    """The axes that layers are divided over, and the dtype and device of their parameters.

    Attributes:
        tp: tensor-parallel axis; size 1 makes every layer its serial self.
        sequence_parallel: whether activations between tensor-parallel regions are divided along the sequence.
        dtype, device: of parameters and activations.
        cp: context-parallel axis, over which the sequence is divided everywhere.
        ep: expert-parallel axis, over which experts are divided; a part of dp.
        cp_algorithm: how attention reaches over it, a key of `nn.context.ALGORITHMS`.
        fp8: how the products of linear layers run in 8 bits; None where they do not.
        tp_comm_overlap: whether they overlap with the collectives of sequence parallelism.
        weight_gradients: where linear layers put weight gradients off while a schedule splits their backward.
        activations: what layers ask for their parts that may be computed again instead of kept.
    """

    tp: Axis
    sequence_parallel: bool
    dtype: torch.dtype
    device: torch.device
    cp: Axis = field(default_factory=lambda: Axis("cp"))
    cp_algorithm: str = "ring"
    ep: Axis = field(default_factory=lambda: Axis("ep"))
    fp8: Recipe | None = None
    tp_comm_overlap: bool = False
    weight_gradients: WeightGradients | None = field(default=None, compare=False)
    activations: Activations = field(default_factory=Activations, compare=False)

    @classmethod
    def of(cls, config: Config, mesh: Mesh, weight_gradients: WeightGradients | None = None) -> "Placement":
        """Return where a resolved recipe puts its layers, on a mesh that runs or a planned one."""
        parallel, dtype = config.parallel, config.train.dtype
        return cls(
            mesh.tp,
            bool(parallel.sequence_parallel),
            DTYPES[dtype],
            mesh.device,
            mesh.cp,
            parallel.cp_algorithm,
            mesh.ep,
            fp8=Tensorwise() if dtype == "fp8" else None,  # what plans count; the engine puts its own there
            tp_comm_overlap=parallel.tp_comm_overlap,
            weight_gradients=weight_gradients,
        )

    @property
    def token_axes(self) -> tuple[str, ...]:
        """Axes over which the gradient of a replicated weight is partial because each rank saw only its own tokens."""
        return ("tp",) if self.sequence_parallel else ()

    def parameter(
        self,
        *shape: int,
        splits: tuple[Split, ...] = (),
        grad_axes: tuple[str, ...] = (),
        decay: bool = True,
        init: Init = Init(),
        matrices: Matrices | None = None,
        dtype: torch.dtype | None = None,
    ) -> nn.Parameter:
        """Make this rank's part of a parameter of logical `shape`; see `dist.layout.parameter`.

        Args:
            dtype: the model's when left out.
        """
        return parameter(
            shape,
            splits=splits,
            grad_axes=grad_axes,
            decay=decay,
            init=init,
            matrices=matrices,
            sizes={"tp": self.tp.size, "ep": self.ep.size},
            dtype=dtype or self.dtype,
            device=self.device,
        )
