"""What a recipe amounts to before it runs: parameters, operations a token, and each pipeline rank's memory.

By hand, Mixtral 8×7B: 46.7 billion parameters, of which a token uses 12.9: of 8 experts a layer it has 2.
"""

import math
from dataclasses import dataclass

from megascratch.config import Config
from megascratch.dist.mesh import Mesh, MeshSpec
from megascratch.engine.flops import TokenFlops, token_flops
from megascratch.engine.memory import MemoryModel, RankMemory
from megascratch.engine.recompute import recompute_plans
from megascratch.nn import Placement, core_for, parameter_specs
from megascratch.nn.active import active_numel


@dataclass(frozen=True)
class ModelPlan:
    """A recipe in numbers.

    Attributes:
        parameters: of the model, modules that look further ahead included.
        active: of those that work on a token when the model generates: of the experts only the chosen ones.
        flops: operations of a token in training.
        memory: of each pipeline rank, at the peak of a step.
    """

    parameters: int
    active: float
    flops: TokenFlops
    memory: list[RankMemory]


def plan_model(config: Config) -> ModelPlan:
    """Count what a recipe needs; nothing is allocated.

    Args:
        config: resolved and checked, `model.vocab_size` included.

    Raises: LayoutError: if `parallel.recompute = "auto"` finds no choice that fits.
    """
    model = config.model
    assert model.vocab_size is not None
    specs = [spec for spec in parameter_specs(model) if not spec.tied]
    generating = active_numel(model.model_copy(update={"mtp_num_layers": 0}))
    looked_up = 0 if model.tie_embeddings else model.vocab_size * model.hidden
    spec = MeshSpec.of(config.parallel)
    return ModelPlan(
        parameters=sum(math.prod(spec.shape) for spec in specs),
        active=sum(generating.values()) + looked_up,
        flops=token_flops(model, config.data.seq_length),
        memory=[_memory(config, Mesh.planned(spec, spec.rank({"pp": pp}))) for pp in range(spec.pp)],
    )


def _memory(config: Config, mesh: Mesh) -> RankMemory:
    placement = Placement.of(config, mesh)
    core = core_for(config.train.attention, mesh.device)
    return MemoryModel(config, mesh, placement, core).with_plans(recompute_plans(config, mesh, placement, core))
