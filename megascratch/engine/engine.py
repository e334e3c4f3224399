"""The engine: the stages of this rank, their optimizer, and one training step on any layout.

    micro-batches ─ pipeline.run(actions) ─ sums of loss and gradients ─ optimizer.step ─ StepReport
                      └ stage(x, tokens) … objective(outputs, micro-batch) on the last stage

A micro-batch's loss is a sum. It is differentiated as it is (times a constant that keeps 16-bit gradients in range),
and everything is divided once by the weight of the whole global batch: no layout can weigh a token differently.

The host writes what a step depends on, queues all of it, and reads what it did: between the two it asks the device for
nothing, so that on a GPU the whole may be one recording (`graph.py`).
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megascratch.config import Config
from megascratch.data.microbatch import Microbatch
from megascratch.dist.mesh import Mesh
from megascratch.engine.graph import StepGraph, cuda_step_graph
from megascratch.engine.objective import Measure, Objective, Outputs
from megascratch.engine.recompute import recompute_plans
from megascratch.engine.router_notes import RouterNotes, metrics_of, move_biases
from megascratch.engine.stages import attach_recipe, compile_layers, make_stages, units_of
from megascratch.engine.totals import DeviceTotals, Queued, Sums, Totals, add_up, tell_pipeline, totals_of
from megascratch.nn import (
    Adapter,
    Placement,
    SequenceInfo,
    Stage,
    WeightGradients,
    core_for,
    packed_weights,
    parameter_specs,
    recipe_of,
    require_adapters,
)
from megascratch.nn.context import token_index
from megascratch.nn.initialize import initialize
from megascratch.optim import LossScale, Optimizer, learning_rate, require_names
from megascratch.pipeline import Action, Boundary, Kind, configured_routes, configured_schedule, run

_End = Callable[[Outputs, Microbatch, int], Tensor]
"""Takes what the last stage made of a micro-batch, this rank's tokens of it, and its number."""
_PHASES = {Kind.F: "forward", Kind.B: "backward", Kind.I: "backward", Kind.W: "backward"}


@dataclass(frozen=True)
class StepReport:
    """What a training step did.

    Attributes:
        loss: mean over the global batch, before the update.
        metrics: the objective's own means, and the routers' statistics.
        grad_norm: global norm before clipping.
        lr: learning rate of the update.
        loss_scale: fp16 factor used in the step; 1 elsewhere.
        skipped: True when nothing was updated: the gradient was not finite, or the step was not accepted.
        kept: what the step was to keep of the tokens of each micro-batch, [b, s], on every rank of tp, cp and pp.
    """

    loss: float
    metrics: dict[str, float]
    grad_norm: float
    lr: float
    loss_scale: float
    skipped: bool
    kept: Sequence[Tensor] = ()


class _Views(NamedTuple):
    """This rank's tokens of a micro-batch, those 1, 2, … places later, and the loss tokens of its whole sequences."""

    microbatch: Microbatch
    later: list[Microbatch]
    loss_tokens: Tensor


class Engine:
    """A model on a mesh, ready to train.

    Args:
        config: resolved and checked, `model.vocab_size` included.
        mesh: this rank's place.
        learns: False for a model that is only run forwards, as a frozen reference.

    Raises: ConfigError: if the device does not have what the recipe asks for.
    """

    def __init__(self, config: Config, mesh: Mesh, learns: bool = True) -> None:
        assert config.model.vocab_size is not None
        self.config, self.mesh = config, mesh
        parallel, train = config.parallel, config.train
        self.fp8 = recipe_of(train.fp8_recipe, mesh) if train.dtype == "fp8" else None
        self.graph: StepGraph[Queued] | None = cuda_step_graph(mesh.device) if train.cuda_graph else None
        self.weight_gradients = WeightGradients()
        placement = Placement.of(config, mesh, self.weight_gradients)
        core = core_for(train.attention, mesh.device)
        plans = recompute_plans(config, mesh, placement, core)
        placement = replace(placement, fp8=self.fp8)
        self.stages = make_stages(config, mesh, placement, configured_routes(parallel), core, plans)
        if config.lora is not None:
            require_adapters(config.lora, parameter_specs(config.model))
        for stage in self.stages.values():
            initialize(dict(stage.named_parameters()), mesh, train.seed)
        for packed in packed_weights(self.stages.values()):
            initialize({packed.spec.name: (weight := packed.blank())}, mesh, train.seed)
            packed.pack(weight)
        if config.optim.frozen or config.optim.groups:
            require_names(config.optim, [spec.name for spec in parameter_specs(config.model)])
        if not learns:
            for stage in self.stages.values():
                stage.requires_grad_(False)
        self.optimizer = Optimizer(units_of(self.stages), mesh, config.optim, parallel)
        if train.compile:
            compile_layers(self.stages, self.optimizer.buckets)
        if self.fp8 is not None:
            attach_recipe(self.fp8, self.stages, self.optimizer.buckets)
        self._weights_stay = self.fp8.weights_stay if self.fp8 is not None and train.fp8_weight_cache else nullcontext
        overlap = self.optimizer.overlap
        self._told_of = {
            Kind.F: (overlap.start_forward, overlap.end_forward),
            Kind.B: (overlap.start_backward, overlap.end_backward),
            Kind.I: (overlap.start_input_backward, overlap.end_input_backward),
            Kind.W: (overlap.start_weight_backward, overlap.end_weight_backward),
        }
        self.loss_scale = LossScale.of(config.optim, train.dtype)
        self.step = 0  # training steps done, skipped ones included
        self.router_notes = RouterNotes(config.model, mesh, placement.sequence_parallel)
        self.schedule = cache(partial(configured_schedule, parallel))  # by number of micro-batches

    def parameters(self) -> list[nn.Parameter]:
        """Return this rank's parameters, each once, in the order of its stages.

        Their values are up to date, but for those that are divided, which are here while `gathered` only.
        """
        self.optimizer.overlap.settle()
        return list(dict.fromkeys(param for stage in self.stages.values() for param in stage.parameters()))

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Have all weights of this rank's stages whole, for what reads them outside of a step."""
        self.optimizer.overlap.gather()
        try:
            yield
        finally:
            self.optimizer.overlap.give_back()

    @contextmanager
    def adapters_off(self) -> Iterator[None]:
        """Compute as the model did before it got adapters."""
        adapters = [m for stage in self.stages.values() for m in stage.modules() if isinstance(m, Adapter)]
        for adapter in adapters:
            adapter.active = False
        try:
            yield
        finally:
            for adapter in adapters:
                adapter.active = True

    def train_step(
        self,
        microbatches: Sequence[Microbatch],
        objective: Objective,
        on_event: Callable[[Action, bool], None] | None = None,
        loss_limit: float = math.inf,
        keep: str | None = None,
    ) -> StepReport:
        """Run one step: forward and backward of this rank's micro-batches, then the update.

        Args:
            microbatches: of this data-parallel rank, all of one length; none makes a step that learns nothing.
            objective: to minimise.
            on_event: called before and after every action of the pipeline; see `pipeline.run`.
            loss_limit: with a larger loss nothing is updated, as with a loss or gradient that is not finite.
            keep: what to keep of what the objective computed of tokens (`Loss.of_tokens`), if anything.
        """
        lr = learning_rate(self.config.optim, self.step + 1, self.config.train.steps)
        if not microbatches:
            self.step += 1
            return StepReport(math.nan, {}, 0.0, lr, self.loss_scale.value, skipped=False)
        for stage in self.stages.values():
            stage.train()
        if self.mesh.roll_call is not None:
            self.mesh.roll_call.step = self.step + 1
        clock, scale = self.mesh.clock, self.loss_scale.value
        self.optimizer.begin_step(lr, scale, loss_limit)
        moved, queue = self._moved(microbatches), partial(self._queue_step, objective, keep)
        if self.graph is None or on_event is not None:  # an observer has to see every action
            queued = queue(moved, on_event)
        else:
            with clock.region("graph"), clock.paused():
                queued = self.graph(queue, moved)
        totals, grad_norm, taken = queued.read()
        kept = () if keep is None else tell_pipeline(queued.kept, len(moved), self.mesh)
        self.optimizer.end_step(taken)
        self.loss_scale.update(overflow=not math.isfinite(grad_norm))
        routers = self.router_notes.reports(totals.weight)
        if taken:
            for stage in self.stages.values():
                move_biases(stage, routers)
        self.step += 1
        metrics = {**totals.metrics, **metrics_of(routers)}
        return StepReport(totals.loss, metrics, grad_norm, lr, scale, not taken, kept)

    @torch.no_grad()
    def evaluate(self, microbatches: Sequence[Microbatch], objective: Objective) -> Totals:
        """Return the means over a global batch, without gradients and with dropout off."""
        for stage in self.stages.values():
            stage.eval()
        totals, _ = self._totals(objective, None, self._moved(microbatches), grad_seed=None)
        return totals.means(totals.values.tolist())

    @torch.no_grad()
    def compute(self, microbatches: Sequence[Microbatch], function: Measure) -> list[Tensor]:
        """Return what a function makes of each micro-batch, without gradients and with dropout off, on every rank.

        Args:
            microbatches: of this data-parallel rank, as many as a step has.
            function: as an objective, but returns a tensor of one shape for all micro-batches, the same on every rank
                of tp and cp (`Outputs.document_sums`, `Outputs.whole_sequences`).

        Returns: on the mesh's device.
        """
        for stage in self.stages.values():
            stage.eval()
        self.router_notes.forget()
        results: dict[int, Tensor] = {}

        def end(outputs: Outputs, microbatch: Microbatch, index: int) -> Tensor:
            results[index] = function(outputs, microbatch)
            return results[index]

        self._drive(self._moved(microbatches), end, grad_seed=None)
        return tell_pipeline(results, len(microbatches), self.mesh)

    def _moved(self, microbatches: Sequence[Microbatch]) -> list[Microbatch]:
        """Return the micro-batches on the device."""
        with self.mesh.clock.region("data"):
            return [microbatch.to(self.mesh.device) for microbatch in microbatches]

    def _queue_step(
        self,
        objective: Objective,
        keep: str | None,
        microbatches: Sequence[Microbatch],
        on_event: Callable[[Action, bool], None] | None = None,
    ) -> Queued:
        """Queue all that a step does, from forgetting the last one's gradients to giving out the new values."""
        optimizer, clock = self.optimizer, self.mesh.clock
        with clock.region("optimizer"):
            optimizer.zero_grads()
        # Sums over a global batch overflow 16 bits where means would not; the exact weight is known only at the end.
        nominal = float(self.config.train.global_batch * self.config.data.seq_length)
        grad_seed = optimizer.inputs.loss_scale / nominal
        if self.fp8 is not None:
            self.fp8.begin_step()
        totals, kept = self._totals(objective, keep, microbatches, grad_seed, on_event)
        if self.fp8 is not None:
            self.fp8.end_step()
        with clock.region("optimizer"):
            result = optimizer.step(nominal / (optimizer.inputs.loss_scale * totals.weight), totals.loss)
            if self.graph is not None:  # what a recording starts must end in it
                optimizer.overlap.settle()
        return Queued(totals, kept, result)

    def _totals(
        self,
        objective: Objective,
        keep: str | None,
        microbatches: Sequence[Microbatch],
        grad_seed: Tensor | None,
        on_event: Callable[[Action, bool], None] | None = None,
    ) -> tuple[DeviceTotals, dict[int, Tensor]]:
        """Drive the pipeline over the micro-batches; `grad_seed` is the gradient of the loss, or None without one."""
        self.router_notes.forget()
        sums: Sums = {}
        kept: dict[int, Tensor] = {}

        def end(outputs: Outputs, microbatch: Microbatch, index: int) -> Tensor:
            loss = objective(outputs, microbatch)
            add_up(sums, loss)
            if keep is not None:
                kept[index] = outputs.whole_sequences(loss.of_tokens[keep])
            total = loss.total if loss.besides is None else loss.total + loss.besides
            return total * grad_seed.to(total.dtype) if grad_seed is not None else total

        self._drive(microbatches, end, grad_seed, on_event)
        return totals_of(sums, self.mesh), kept

    def _drive(
        self,
        microbatches: Sequence[Microbatch],
        end: "_End",
        grad_seed: Tensor | None,
        on_event: Callable[[Action, bool], None] | None = None,
    ) -> None:
        """Run the pipeline's actions on microbatches that are on the device; `end` takes the last stage's outputs."""
        moved = [self._views(microbatch) for microbatch in microbatches]
        functions = {
            index: partial(self._run_stage, stage, moved, end, grad_seed) for index, stage in self.stages.items()
        }
        backward = grad_seed is not None
        schedule = self.schedule(len(moved), backward=backward)
        if backward:
            self.optimizer.overlap.begin_step(
                Counter(a.stage for a in schedule.actions[self.mesh.pp.rank] if a.kind in (Kind.B, Kind.W))
            )
        with self._weights_stay():
            run(
                schedule,
                functions,
                self.mesh.pp,
                self._boundary(moved[0].microbatch),
                backward=backward,
                weight_gradients=self.weight_gradients,
                on_event=partial(self._on_event, on_event),
            )

    def _on_event(self, on_event: Callable[[Action, bool], None] | None, action: Action, starts: bool) -> None:
        """Pass an event of the pipeline on to the clock, to the buckets, and to who else wants to know."""
        if action.kind.is_compute and starts:
            self.mesh.clock.enter(_PHASES[action.kind], f"{_PHASES[action.kind]} {action}")
            self._told_of[action.kind][0](action.stage)
        if on_event is not None:
            on_event(action, starts)
        if action.kind.is_compute and not starts:
            self._told_of[action.kind][1](action.stage)
            self.mesh.clock.leave()

    def _run_stage(
        self,
        stage: Stage,
        microbatches: Sequence["_Views"],
        end: "_End",
        grad_seed: Tensor | None,
        x: Tensor | None,
        index: int,
    ) -> Tensor:
        """Run a stage on micro-batch `index`: the activations, or on the last stage what `end` makes of them."""
        microbatch, later, loss_tokens = microbatches[index]
        data = self.config.data
        info = SequenceInfo(
            length=microbatch.tokens.shape[1],
            positions=microbatch.position_ids if data.reset_position_ids or self.mesh.cp.size > 1 else None,
            documents=microbatch.documents if data.reset_attention_mask else None,
            sample_ids=microbatch.sample_ids,
            seed=self.config.train.seed,
            loss_tokens=loss_tokens,
            loss_seed=1.0 if grad_seed is None else grad_seed,
        )
        y = stage.trunk(x, microbatch.tokens, info)
        if not stage.is_last:
            self.router_notes.add(info.notes)
            return y
        assert stage.model.vocab_size is not None
        outputs = Outputs(
            stage.norm(y),
            stage.head_weight,
            stage.model.vocab_size,
            self.mesh.tp,
            self.mesh.cp,
            stage.placement.sequence_parallel,
            softcap=stage.model.logit_softcap,
        )
        if later and grad_seed is not None:
            further = stage.look_ahead(y, [m.tokens for m in later], info)
            ahead = [(replace(outputs, hidden=hidden), m) for hidden, m in zip(further, later)]
            outputs = replace(outputs, ahead=ahead, ahead_factor=stage.model.mtp_loss_scaling_factor)
        self.router_notes.add(info.notes)
        return end(outputs, microbatch, index)

    def _views(self, microbatch: Microbatch) -> "_Views":
        """Return what the stages read of a micro-batch."""
        n_ahead = self.config.model.mtp_num_layers
        later = [self._own_tokens(microbatch.ahead(n)) for n in range(1, n_ahead + 1)]
        return _Views(self._own_tokens(microbatch), later, microbatch.loss_mask.sum(1))

    def _own_tokens(self, microbatch: Microbatch) -> Microbatch:
        """Return the tokens that this rank of cp holds."""
        if self.mesh.cp.size == 1:
            return microbatch
        return microbatch.part(token_index(microbatch.tokens.shape[1], self.mesh.cp, self.mesh.device))

    def _boundary(self, microbatch: Microbatch) -> Boundary:
        """Return what passes between stages for this rank's tokens of a micro-batch; of one shape in a step."""
        placement = next(iter(self.stages.values())).placement
        b, s = microbatch.tokens.shape
        s //= placement.tp.size if placement.sequence_parallel else 1
        return Boundary((s, b, self.config.model.hidden), placement.dtype, self.mesh.device)
