"""An engine's state as a checkpoint's shards, and back.

A checkpoint knows logical tensors only, so this is where a rank says which part of each it holds: its parameters by
`extents`, its runs of optimizer state by `run_extents`. Resharding is loading.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from megascratch.checkpoint import OPTIMIZER, Reader, Shard, find, load, read_state, save, weight_shards
from megascratch.checkpoint.format import whole
from megascratch.config import ModelConfig
from megascratch.dist.agreement import require_agreement, tensor_digest
from megascratch.dist.layout import Extent, spec_of
from megascratch.dist.mesh import Mesh
from megascratch.engine.engine import Engine
from megascratch.errors import CheckpointError, Problem
from megascratch.nn import Recipe, is_addition, packed_weights
from megascratch.optim import StatePart

# Keys of [model] that say how a model was made or is run, not which weights it has.
_NOT_ARCHITECTURE = {"preset", "dropout", "init_std", "max_seq_length", "rope_scaling"}
_NOT_ARCHITECTURE |= {f"moe.{key}" for key in ("router_load_balancing_type", "aux_loss_coeff", "z_loss_coeff")}
_NOT_ARCHITECTURE |= {"moe.router_bias_update_rate", "moe.expert_capacity_factor"}


def engine_shards(engine: Engine) -> list[Shard]:
    """Return this rank's parts of the weights: whole parameters, and runs of those that are divided."""
    divided = [_run_shard(part.spec.name, part) for part in engine.optimizer.weight_parts()]
    whole = [param for param in engine.parameters() if not engine.optimizer.divides(param)]
    return [*weight_shards(whole, engine.mesh), *divided]


def require_equal_replicas(engine: Engine) -> None:
    """Check, bit for bit, that ranks which hold the same part of a weight hold the same values. Every rank calls this.

    Weights that are divided have no replica to be compared with, but under `zero_ranks`: those are left out.

    Raises: LayoutError: naming rank and weight.
    """
    mesh, params = engine.mesh, [param for param in engine.parameters() if not engine.optimizer.divides(param)]
    for axis in (mesh.data, mesh.expert_data):
        own = [param for param in params if mesh.axis(spec_of(param).data_axis) is axis]
        require_agreement({spec_of(param).name: tensor_digest(param) for param in own}, axis, mesh.device)


def optimizer_shards(engine: Engine) -> list[Shard]:
    """Return this rank's runs of the optimizer's state, and what an fp8 recipe remembers of its layers.

    A run in another precision widens or rounds the state, and takes master weights from the model's where a checkpoint
    has none; one without a recipe has nothing to remember.
    """
    runs = [
        replace(
            _run_shard(f"{OPTIMIZER}{part.kind}/{part.spec.name}", part),
            casts=True,
            stand_in=part.spec.name if part.kind == "master" else None,
        )
        for part in engine.optimizer.state_parts()
    ]
    return runs + ([] if engine.fp8 is None else _fp8_shards(engine.fp8, engine.mesh))


def _fp8_shards(recipe: Recipe, mesh: Mesh) -> list[Shard]:
    """Return what a recipe remembers. It is named so as not to be taken for a weight's: it has a shape of its own."""
    shards = []
    for spec, tensor in recipe.state():
        name, everything = f"{OPTIMIZER}fp8/amax_history.{spec.name}", whole(tensor.shape)
        copies = not spec.tied, mesh.stage.rank, mesh.stage.size
        extents = [Extent(everything, everything)]
        shards.append(Shard(name, tuple(tensor.shape), tensor, extents, *copies, optional=True))
    return shards


def _run_shard(name: str, part: StatePart) -> Shard:
    """Return a bucket's run as a shard; the ranks that hold the same run share the writing."""
    replicas = part.replicas
    return Shard(name, part.spec.shape, part.tensor, part.extents, part.counts, replicas.rank, replicas.size)


def engine_state(engine: Engine, consumed_samples: int) -> dict[str, Any]:
    """Return what the next step depends on besides tensors."""
    return {
        "consumed_samples": consumed_samples,
        "updates": engine.optimizer.updates,
        "loss_scale": {"value": engine.loss_scale.value, "good_steps": engine.loss_scale.good_steps},
        # Every random number is a function of this seed, a name and an index, so it is the whole generator state.
        "rng": {"seed": engine.config.train.seed},
        "config": engine.config.model_dump(mode="json"),
    }


def companion_name(name: str) -> str:
    """Return what a further engine's tensors and state are called by in the checkpoint of the first one."""
    return f"companions/{name}"


def companion_shards(name: str, engine: Engine) -> list[Shard]:
    """Return this rank's parts of a further engine: weights and optimizer state."""
    prefix = companion_name(name)
    return [
        replace(
            shard,
            name=f"{prefix}/{shard.name}",
            stand_in=None if shard.stand_in is None else f"{prefix}/{shard.stand_in}",
        )
        for shard in (*engine_shards(engine), *optimizer_shards(engine))
    ]


def restore_counters(engine: Engine, state: Mapping[str, Any]) -> int:
    """Put back what `engine_state` said, once tensors are loaded; returns how many samples the run has consumed."""
    engine.optimizer.publish_masters()
    if engine.fp8 is not None:
        engine.fp8.refresh()
    engine.optimizer.updates = int(state["updates"])
    engine.loss_scale.value = float(state["loss_scale"]["value"])
    engine.loss_scale.good_steps = int(state["loss_scale"]["good_steps"])
    engine.step = int(state["step"])
    return int(state["consumed_samples"])


def save_engine(engine: Engine, root: Path, consumed_samples: int) -> Path:
    """Write a checkpoint of everything that the next step depends on. Every rank calls this at the same point."""
    shards = [*engine_shards(engine), *optimizer_shards(engine)]
    world, device = engine.mesh.world, engine.mesh.device
    return save(root, engine.step, shards, engine_state(engine, consumed_samples), world, device=device)


def load_engine(engine: Engine, path: Path) -> int:
    """Load a checkpoint of any layout into this one, and return how many samples the run has consumed.

    A checkpoint without optimizer state (imported weights) starts a run at step 0.

    Raises: CheckpointError: if it is of another model, damaged, or incomplete.
    """
    path = find(path)
    state = read_state(path)
    _require_same_model(engine.config.model, state, path)
    if "updates" not in state:
        load(path, engine_shards(engine), cast=True)
        engine.optimizer.refresh_masters()
        return 0
    load(path, [*engine_shards(engine), *optimizer_shards(engine)])
    return restore_counters(engine, state)


def load_weights(engine: Engine, path: Path) -> None:
    """Begin with the weights of a checkpoint of any layout and way of training; everything else is as in a new run.

    What this model has beside them, a scalar head or adapters, keeps its initial values. What it holds in 4 bits is
    packed here, one weight after the other.

    Raises: CheckpointError: if it is of another model, damaged, or incomplete.
    """
    path = find(path)
    _require_same_model(
        engine.config.model, read_state(path), path, but=("head", "mtp_num_layers", "mtp_loss_scaling_factor")
    )
    saved = Reader(path).manifest.tensors
    to_pack = [packed for packed in packed_weights(engine.stages.values()) if packed.spec.name in saved]
    later = {spec_of(param).name for packed in to_pack for param in packed.parameters()}
    shards = [s for s in engine_shards(engine) if s.name not in later]
    load(path, [s for s in shards if s.name in saved or not is_addition(s.name)], cast=True)
    for packed in to_pack:
        weight = packed.blank()
        load(path, weight_shards([weight], engine.mesh), cast=True)
        packed.pack(weight)
    engine.optimizer.refresh_masters()


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the keys of nested tables as moe.num_experts."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        inside = key not in _NOT_ARCHITECTURE and isinstance(value, dict)
        flat |= _flat(value, f"{prefix}{key}.") if inside else {f"{prefix}{key}": value}
    return flat


def _require_same_model(model: ModelConfig, state: dict[str, Any], path: Path, but: tuple[str, ...] = ()) -> None:
    saved = _flat(state.get("config", {}).get("model", {}))
    problems = [
        Problem(f"model.{key} = {value}", f"must be {saved[key]}, as in the checkpoint", "use the checkpoint's value")
        for key, value in _flat(model.model_dump(mode="json")).items()
        if key not in _NOT_ARCHITECTURE and key not in but and key in saved and saved[key] != value
    ]
    if problems:
        raise CheckpointError(problems, str(path))
