"""The stages of this rank: which, of how many layers, and how their copies on other ranks are kept equal."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from megascratch.config import Config
from megascratch.dist.layout import spec_of
from megascratch.dist.mesh import Mesh
from megascratch.errors import LayoutError, Problem
from megascratch.nn import Placement, Recipe, Recompute, Stage, add_adapters
from megascratch.nn.balance import balanced_layers
from megascratch.nn.linear import ColumnParallelLinear, RowParallelLinear
from megascratch.optim import Unit, is_frozen
from megascratch.optim.buckets import Bucket
from megascratch.pipeline import Route


def make_stages(
    config: Config,
    mesh: Mesh,
    placement: Placement,
    routes: tuple[Route, ...],
    core: str,
    recompute: Mapping[int, Recompute] | None = None,
) -> dict[int, Stage]:
    """Make every stage that a route has on this rank, by its number, not yet initialised.

    Args:
        config: resolved, `model.vocab_size` included.
        mesh: this rank's place.
        placement: where the parameters lie.
        routes: the rank of each stage; two where the model is there twice.
        core: attention core.
        recompute: what each layer, by its number, does not keep for backward.

    Raises: LayoutError: if the embedding is tied and its two ends lie where no group joins them.
    """
    rank, n_stages = mesh.pp.rank, len(routes[0])
    first_rank, last_rank = routes[0][0], routes[0][-1]
    together = first_rank == last_rank or len(routes) == 2  # with two copies, each end's rank has both ends
    if config.model.embeds_at_end and not together and (first_rank, last_rank) != (0, mesh.pp.size - 1):
        rule = f"needs the first and last stage on ranks 0 and {mesh.pp.size - 1}, or on one rank"
        key = "tie_embeddings = true" if config.model.tie_embeddings else "mtp_num_layers"
        raise LayoutError(Problem(f"model.{key}", rule, "reorder the lines of the schedule file"))
    stages: dict[int, Stage] = {}
    for index in sorted({stage for route in routes for stage, holder in enumerate(route) if holder == rank}):
        shared = config.model.embeds_at_end and together and 0 < index == n_stages - 1
        stages[index] = Stage(
            config.model,
            placement,
            index,
            n_stages,
            core=core,
            recompute=recompute,
            layers_per_stage=layers_per_stage(config, n_stages),
            tied_axes=() if together else ("ends",),
            embedding=stages[0].embed if shared else None,
        )
        if config.lora is not None:
            add_adapters(stages[index], config.lora)
        for param in stages[index].parameters():
            if is_frozen(config.optim, spec_of(param).name):
                param.requires_grad_(False)
    if len(routes) == 2:
        for index, stage in stages.items():  # in order: the embedding that two stages share is of the first
            _sum_with_mirror(stage, second_copy=routes[0][index] != rank)
    return stages


def compile_layers(stages: Mapping[int, Stage], buckets: Iterable[Bucket]) -> None:
    """Have torch.compile make the layers' forward and backward, around the fused operators, at their first use.

    Layers differ in their parameters alone, so what one was compiled to serves all. Hooks stay outside: the optimizer's
    differ from layer to layer.
    """
    for stage in stages.values():
        for block in stage.layers.values():
            block.forward = torch.compile(block.forward)
    for bucket in buckets:
        bucket.keep_grads()


def layers_per_stage(config: Config, n_stages: int) -> tuple[int, ...]:
    """Return how many layers each stage holds, or nothing where they are even."""
    given = config.parallel.layers_per_stage
    if given == "balanced":
        return balanced_layers(config.model, config.data.seq_length, n_stages)
    return tuple(given or ())


def _sum_with_mirror(stage: Stage, second_copy: bool) -> None:
    """Have the gradients of the model's two copies summed; the second is neither saved nor counted."""
    for param in stage.parameters():
        spec = spec_of(param)
        if "mirror" in spec.grad_axes:
            continue
        tied = spec.tied or second_copy
        param.spec = replace(spec, grad_axes=(*spec.grad_axes, "mirror"), tied=tied)  # type: ignore[attr-defined]


def linear_weights(parts: Iterable[nn.Module]) -> list[Tensor]:
    """Return the weights of all layers in parts of a model that may multiply in 8 bits."""
    kinds = ColumnParallelLinear, RowParallelLinear
    layers = [module for part in parts for module in part.modules() if isinstance(module, kinds)]
    return [layer.weight for layer in layers if isinstance(layer.weight, Tensor)]


def attach_recipe(recipe: Recipe, stages: Mapping[int, Stage], buckets: Iterable[Bucket]) -> None:
    """Tell an fp8 recipe which weights there are, and have it told when ZeRO-3 gives some back."""
    recipe.attach(linear_weights(stages.values()))
    for bucket in buckets:
        bucket.on_release = recipe.release


def units_of(stages: Mapping[int, Stage]) -> list[Unit]:
    """Return the parameters of stages, each once, in units that are used together: layers, and what is around them."""
    users: dict[nn.Parameter, set[int]] = defaultdict(set)
    for index, stage in stages.items():
        for param in stage.parameters():
            users[param].add(index)
    units, linear = [], frozenset(linear_weights(stages.values()))
    for stage in stages.values():
        layers = {param: block for block in stage.layers.values() for param in block.parameters()}
        rest: dict[frozenset[int], list[nn.Parameter]] = defaultdict(list)
        for param in stage.parameters():
            if param not in layers and param in users:
                rest[frozenset(users.pop(param))].append(param)
        units += [Unit(stages, tuple(params), linear=linear) for stages, params in rest.items()]
        units += [
            Unit(frozenset(users[next(block.parameters())]), tuple(block.parameters()), block, linear)
            for block in stage.layers.values()
        ]
    return units
