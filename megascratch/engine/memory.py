"""Device memory of a rank, predicted before anything is allocated.

Legend: P parameters of the rank, `d` ranks that share state under ZeRO: dp × cp, without ep for experts. Bytes a
parameter, 16-bit model:

    weights      2, ÷ d under ZeRO-3; of those multiplied in fp8 2 more, quantised, while a step runs; where codes
                 travel, 2/d + 1/d and 2 for the codes, along rows and columns
    gradients    4 (summed in float32), ÷ d from ZeRO-2 on
    optimizer    12: float32 masters and two moments, ÷ d from ZeRO-1 on; less as `optim.precision` says

Those that do not learn (`optim.frozen`, all beside adapters) are whole on every rank and have only their weights;
packed in 4 bits they take 0.52, and the largest is unpacked while it multiplies.

Activations are what one layer keeps (`nn.layer_costs`, counted on the meta device), times the layers of a stage, times
the micro-batches in flight (the schedule's checker). To them comes what exists a moment only: one recomputed layer, the
head's gradients, and under ZeRO gradients on their way and the layers whose weights are whole while in use; what fp8
makes of ZeRO-3's weights goes with them.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from megascratch import ops
from megascratch.config import Config
from megascratch.dist.layout import spec_of
from megascratch.dist.mesh import Mesh
from megascratch.engine.stages import layers_per_stage, linear_weights, make_stages
from megascratch.nn import NOTHING, Placement, Recompute, layer_range, packed_weights
from megascratch.nn.layer_costs import META, LayerShape
from megascratch.nn.loss import CHUNK_TOKENS
from megascratch.optim import BUCKETS_UNDER_WAY, Precision, leaf_length
from megascratch.pipeline import configured_routes, configured_schedule, peak_in_flight

GIB = 1 << 30

# By `train.fp8_recipe`: what is kept of a quantised weight, once along its rows and once along its columns, scales too.
_QUANTIZED_BYTES = {"tensorwise": 2.0, "delayed": 2.0, "blockwise": 2.0, "mxfp8": 2 * (1 + 1 / 32)}


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank's device at the peak of a step, and what of its weights and optimizer the host keeps for it."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    passing: int
    host: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.passing


def _learning_numel(params: Iterable[Tensor]) -> int:
    return sum(param.numel() for param in params if param.requires_grad)


def layer_shape(config: Config, placement: Placement, core: str, experts: bool) -> LayerShape:
    """Return a layer of a run, with or without experts, as a rank sees it."""
    data, b = config.data, config.train.micro_batch
    return LayerShape(config.model, placement, b, data.seq_length, core, experts, packed=data.reset_attention_mask)


def own_layers(config: Config, mesh: Mesh) -> dict[int, range]:
    """Return the layers of each stage of this rank; the last stage's modules that look ahead follow its own."""
    routes = configured_routes(config.parallel)
    n_stages = len(routes[0])
    own = sorted({stage for route in routes for stage, rank in enumerate(route) if rank == mesh.pp.rank})
    counts = layers_per_stage(config, n_stages)
    layers = {stage: layer_range(config.model.n_layers, stage, n_stages, counts) for stage in own}
    if (last := n_stages - 1) in layers:
        layers[last] = range(layers[last].start, layers[last].stop + config.model.mtp_num_layers)
    return layers


class MemoryModel:
    """What a rank's memory depends on but the recomputation, counted once.

    Args:
        config: resolved, `model.vocab_size` included.
        mesh: the rank's place; its process groups are not used.
        placement: as the rank's layers get it.
        core: attention core.
    """

    def __init__(self, config: Config, mesh: Mesh, placement: Placement, core: str) -> None:
        self.config, self.mesh, self.placement = config, mesh, placement
        self.precision = Precision.of(config.optim, placement.dtype)
        parallel, train = config.parallel, config.train
        self.kinds = {experts: layer_shape(config, placement, core, experts) for experts in (False, True)}
        self.layers = own_layers(config, mesh)
        routes = configured_routes(parallel)
        meta = replace(placement, device=META)
        stages = make_stages(config, mesh, meta, routes, core)
        unique = {id(param): param for stage in stages.values() for param in stage.parameters()}.values()
        self.numel: dict[str, int] = {}  # of those that learn, by the axis that ZeRO divides state over
        for param in unique:
            if param.requires_grad:
                axis = spec_of(param).data_axis
                self.numel[axis] = self.numel.get(axis, 0) + param.numel()
        self.frozen_bytes = sum(param.nbytes for param in unique if not param.requires_grad)
        self.unpacked_bytes = max((packed.working_bytes for packed in packed_weights(stages.values())), default=0)
        layers = [block for stage in stages.values() for block in stage.layers.values()]
        of_layers = [_learning_numel(block.parameters()) for block in layers]
        self.layer_numel, self.rest_numel = max(of_layers, default=0), sum(self.numel.values()) - sum(of_layers)
        linear = linear_weights(stages.values())
        of_layers = [_learning_numel(linear_weights([block])) for block in layers]
        self.linear_numel = _learning_numel(linear)
        self.linear_in_use = self.linear_numel - sum(of_layers) + max(of_layers, default=0)
        self.linear_frozen = sum(weight.numel() for weight in linear) - self.linear_numel
        self.in_codes = parallel.fp8_param_gather and self._shards("data") > 1
        self.has_head = any(stage.is_last for stage in stages.values())
        self.head_learns = any(stage.is_last and stage.head_weight.requires_grad for stage in stages.values())
        n_microbatches = train.global_batch // (train.micro_batch * (parallel.dp or 1))
        leaves = n_microbatches // leaf_length(n_microbatches)
        self.n_sums = leaves.bit_length() if parallel.deterministic_dp else 1  # subtrees of a rank, held at once
        self.in_flight = peak_in_flight(configured_schedule(parallel, n_microbatches).actions[mesh.pp.rank])

    def with_plans(self, plans: Mapping[int, Recompute]) -> RankMemory:
        """Return the memory when each layer, by its number, does without what its plan says."""
        value, precision = self.placement.dtype.itemsize, self.precision
        kept = cache(lambda experts, plan: self.kinds[experts].kept_bytes(plan))
        has_experts = self.config.model.has_experts
        of_stages = [
            sum(kept(has_experts(i), plans.get(i, NOTHING)) for i in layers) for layers in self.layers.values()
        ]
        # One layer at a time is whole in its backward, of those that are computed again.
        whole = {(has_experts(i), plan) for i, plan in plans.items()}
        passing = max((kept(experts, NOTHING) - kept(experts, plan) for experts, plan in whole), default=0)
        parallel = self.config.parallel
        away = parallel.offload_optimizer or parallel.offload_parameters  # the optimizer follows the parameters
        averages = sum(dtype.itemsize for dtype in precision.averages.values())
        optimizer = self._state_bytes(self._master_bytes + averages, divided_from=1)
        weights = self._state_bytes(value, divided_from=3) + self._code_bytes()
        quantized, quantized_in_use = self._quantized_bytes()
        return RankMemory(
            weights=(0 if parallel.offload_parameters else weights) + self.frozen_bytes + quantized,
            gradients=self._state_bytes(self.n_sums * precision.grads.itemsize, divided_from=2),
            optimizer=0 if away else optimizer,
            activations=max(of_stages) * self.in_flight,
            passing=passing
            + (self._head_bytes() if self.has_head else 0)
            + self._travelling_bytes()
            + self.unpacked_bytes
            + quantized_in_use,
            host=(optimizer if away else 0) + (weights if parallel.offload_parameters else 0),
        )

    def _quantized_bytes(self) -> tuple[int, int]:
        """Return the bytes that fp8 makes of weights for a step, and for as long as ZeRO-3 has a layer's."""
        train = self.config.train
        if train.dtype != "fp8" or not train.fp8_weight_cache:
            return 0, 0
        whole = _QUANTIZED_BYTES[train.fp8_recipe]
        each = 1.0 if self.in_codes else whole  # codes come along their rows
        stays = int(whole * self.linear_frozen)
        if self.config.parallel.zero == 3 and self._shards("data") > 1:
            return stays, int(each * self.linear_in_use)
        return stays + int(each * self.linear_numel), 0

    def _code_bytes(self) -> int:
        """Return what weights cost more, or less, where codes of them travel: every rank has its own, and most all."""
        if not self.in_codes:
            return 0
        value, shards = self.placement.dtype.itemsize, self._shards("data")
        own = self.linear_numel // shards
        if self.config.parallel.zero == 3:
            return own
        return own + self.linear_numel - value * (self.linear_numel - own)

    def _travelling_bytes(self) -> int:
        """Return what ZeRO has whole on its way: gradients of a few buckets, weights of two layers and of the ends."""
        value, sum_ = self.placement.dtype.itemsize, self.precision.grads.itemsize
        zero = self.config.parallel.zero if any(self._shards(axis) > 1 for axis in self.numel) else 0
        numel = sum(self.numel.values())
        buckets = min((BUCKETS_UNDER_WAY + 1) * self.config.optim.bucket_numel, numel) * sum_
        weights = min(2 * self.layer_numel + self.rest_numel, numel) * value
        if self.in_codes:
            weights -= min(2 * self.linear_in_use, self.linear_numel) * (value - 1)
        return (buckets if zero >= 2 else 0) + (weights if zero == 3 else 0)

    def _shards(self, axis: str) -> int:
        """Return over how many replicas ZeRO divides what lies along an axis."""
        return self.mesh.shard.size if axis == "data" else self.mesh.axis(axis).size

    @property
    def _master_bytes(self) -> int:
        """Bytes that a weight has in the optimizer, beside the model's."""
        value, precision, parallel = self.placement.dtype.itemsize, self.precision, self.config.parallel
        if precision.in_halves:
            return precision.values.itemsize - value
        apart = parallel.offload_optimizer and not parallel.offload_parameters
        return precision.values.itemsize if precision.values.itemsize > value or apart else 0

    def _state_bytes(self, bytes_each: int, divided_from: int) -> int:
        """Return the bytes of so many a parameter, divided over replicas from a ZeRO stage on."""
        divides = self.config.parallel.zero >= divided_from
        return sum(numel * bytes_each // (self._shards(axis) if divides else 1) for axis, numel in self.numel.items())

    def _head_bytes(self) -> int:
        """Return what the head's product and the loss need at once: see `nn.loss`."""
        model, train = self.config.model, self.config.train
        assert model.vocab_size is not None
        value, sum_ = self.placement.dtype.itemsize, ops.acc_dtype(torch.empty(0, dtype=self.placement.dtype)).itemsize
        words = -(-model.vocab_size // self.placement.tp.size)
        tokens = train.micro_batch * self.config.data.seq_length // self.mesh.cp.size
        chunk = min(tokens, CHUNK_TOKENS) * words * value
        gradient = words * model.hidden * (sum_ + value) if self.head_learns else 0
        return chunk + gradient + 2 * tokens * model.hidden * value
