"""Which layers compute what again: decided here, for every layer of a rank, and nowhere else.

    none        every layer keeps everything
    selective   every layer computes its cheap parts again: those named, or those that save most bytes an operation
    full        every layer keeps its input alone
    block       the first n layers of each stage keep their input alone, the others everything
    auto        as little again as fits the memory budget: first cheap parts in all layers, then whole layers

By hand, `auto` on 4 layers that keep 34 MB each, 26 without the norms' results, 19 without the activation's too, 2 when
whole; 1 micro-batch in flight, 60 MB left of the budget: 4 · 34 = 136 and 4 · 26 = 104 and 4 · 19 = 76 are too many,
2 + 3 · 19 = 59 fit: layer 0 is computed again, the others do without their cheap parts.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace

from megascratch.config import Config
from megascratch.dist.mesh import Mesh
from megascratch.engine.memory import GIB, MemoryModel, RankMemory, layer_shape, own_layers
from megascratch.errors import LayoutError, Problem
from megascratch.nn import NOTHING, WHOLE, Placement, Recompute

Plans = dict[int, Recompute]


def recompute_plans(config: Config, mesh: Mesh, placement: Placement, core: str) -> Plans:
    """Return what each layer of this rank, by its number, computes again.

    Args:
        config: resolved, `model.vocab_size` included.
        mesh: this rank's place.
        placement: as its layers get it.
        core: attention core.

    Raises: LayoutError: if even with everything computed again the rank needs more than its budget.
    """
    parallel, stages = config.parallel, own_layers(config, mesh)
    match parallel.recompute:
        case "none":
            plans = _every(stages, NOTHING)
        case "selective":
            named = parallel.recompute_modules
            kinds = {experts: layer_shape(config, placement, core, experts) for experts in (False, True)}
            plans = {
                i: Recompute(frozenset(kinds[config.model.has_experts(i)].parts if named is None else named))
                for i in _every(stages, NOTHING)
            }
        case "full":
            plans = _every(stages, WHOLE)
        case "block":
            plans = _every(stages, NOTHING)
            for layers in stages.values():
                plans |= dict.fromkeys(layers[: parallel.recompute_layers], WHOLE)
        case "auto":
            assert parallel.memory_budget_gib is not None
            memory = MemoryModel(config, mesh, placement, core)
            plans = _fitted(memory, parallel.memory_budget_gib * GIB, parallel.offload_activations)
    return _offloaded(plans) if parallel.offload_activations else plans


def _every(stages: Mapping[int, range], plan: Recompute) -> Plans:
    return {i: plan for layers in stages.values() for i in layers}


def _offloaded(plans: Plans) -> Plans:
    return {i: replace(plan, offload=True) for i, plan in plans.items()}


def _fitted(memory: MemoryModel, budget: float, offload: bool) -> Plans:
    """Return the first choice that fits, in the order of operations spent."""
    for plans in _choices(memory):
        need = memory.with_plans(_offloaded(plans) if offload else plans)
        if need.total <= budget:
            return plans
    raise LayoutError(
        Problem(
            f"parallel.memory_budget_gib = {budget / GIB:g}",
            f"is less than rank {memory.mesh.rank} needs with every layer computed again: {describe(need)}",
            "raise tp, pp or zero, lower micro_batch, or set offload_activations",
        )
    )


def _choices(memory: MemoryModel) -> Iterator[Plans]:
    """Yield plans, each with more to compute again than the one before."""
    layers = _every(memory.layers, NOTHING)
    parts = {i: memory.kinds[memory.config.model.has_experts(i)].parts for i in layers}
    for n in range(max(map(len, parts.values())) + 1):
        plans = {i: Recompute(frozenset(parts[i][:n])) for i in layers}
        yield plans
    for n in range(max(map(len, memory.layers.values()))):
        plans = plans | {layers[n]: WHOLE for layers in memory.layers.values() if n < len(layers)}
        yield plans


def describe(memory: RankMemory) -> str:
    """Return a prediction in words: the total in GiB, and what makes it."""
    parts = {name: getattr(memory, name) for name in ("weights", "gradients", "optimizer", "activations", "passing")}
    return f"{memory.total / GIB:.3g} GiB ({', '.join(f'{name} {b / GIB:.3g}' for name, b in parts.items())})"
