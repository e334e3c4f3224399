"""The one training loop: steps, validation, checkpoints, metrics, and an orderly end.

for each step: train ─ (validate) ─ log ─ (save) ─ asked to stop? save and leave with 75
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from rich.console import Console

from megascratch.config import Config
from megascratch.data.microbatch import Microbatch
from megascratch.dist import comm
from megascratch.dist.launch import StopSignal
from megascratch.dist.mesh import Mesh
from megascratch.engine.checkpoints import Checkpoints, Vote
from megascratch.engine.engine import Engine, StepReport
from megascratch.engine.gpu import GpuMonitor
from megascratch.engine.guard import Guard
from megascratch.engine.meter import Meter, peak_memory_bytes
from megascratch.engine.metrics import RunDirectory, describe_step
from megascratch.engine.task import Task, Validation
from megascratch.engine.totals import Totals
from megascratch.engine.trace import traced
from megascratch.errors import EXIT_DONE, EXIT_STOPPED
from megascratch.log import progress
from megascratch.pipeline import Recorder, times_text


class Trainer:
    """Trains an engine on batches until the run is done or asked to stop.

    Args:
        engine: the model, loaded where it resumes.
        task: batches and objective.
        run: the run directory.
        console: rank-aware.
        checkpoints: saves the engine.
        guard: watches over steps and ranks.
        consumed_samples: where in the data the run stands.
    """

    def __init__(
        self,
        engine: Engine,
        task: Task,
        run: RunDirectory,
        console: Console,
        checkpoints: Checkpoints,
        guard: Guard,
        consumed_samples: int = 0,
    ) -> None:
        self.engine, self.task = engine, task
        self.run_directory, self.console, self.consumed_samples = run, console, consumed_samples
        self.checkpoints, self.guard = checkpoints, guard
        self.gpu = GpuMonitor(self.mesh.device)
        self.meter = Meter(self.config, self.mesh)

    @property
    def config(self) -> Config:
        return self.engine.config

    @property
    def mesh(self) -> Mesh:
        return self.engine.mesh

    def run(self) -> int:
        """Train to the end, or to `train.stop_step`, or until asked to stop.

        Returns: 0 when done, 75 when stopped by a signal or the stop file after a checkpoint was saved.

        Raises:
            DivergedError: if too many steps in a row had to be skipped; what was trained is saved.
            ReplicaError: if ranks differ that should not.
        """
        train = self.config.train
        last = min(train.steps, train.stop_step or train.steps)
        stop, stopped = StopSignal(self.config.checkpoint.deadline_s), False
        remaining = last - self.engine.step
        batches = self.task.train.steps(self.consumed_samples, max(0, remaining))
        with progress(self.console, "train", remaining, "steps") as advance:
            for _ in range(remaining):
                values = self._step(batches)
                asked, values["peak_memory_bytes"], vote = self._agree(stop)
                stopped = asked and self.engine.step % self.task.resumable_every == 0
                due = self.config.eval.every and self.engine.step % self.config.eval.every == 0
                if self.task.validation is not None and (due or self.engine.step == train.steps):
                    values |= self._validate(self.task.validation)
                self.run_directory.log(values)
                if self.engine.step % self.config.log.every == 0 or self.engine.step == last:
                    describe_step(values, self.console)
                advance(1)
                diverged = self.guard.must_stop
                ending = stopped or diverged or self.engine.step == last
                state = self.task.state() | self.guard.state()
                self.checkpoints.after_step(vote, self.consumed_samples, state, ending=ending)
                if diverged:
                    raise self.guard.stop()
                if stopped:
                    break
        stop.done()
        if stopped and self.engine.step < last:
            self.console.print(f"stopped after step {self.engine.step}; the same command resumes")
            return EXIT_STOPPED
        return EXIT_DONE

    def _step(self, batches: Iterator[list[Microbatch]]) -> dict[str, Any]:
        """Run one step on the next batch and return the values to log."""
        clock, step = self.mesh.clock, self.engine.step + 1
        clock.step = step
        n_samples = self.config.train.batch_at(self.consumed_samples)
        clock.read()  # validation and saving since the last step are no part of this one
        start = time.perf_counter()
        recorder = Recorder(self.mesh.device) if step == self.config.log.pipeline_step else None
        with self._traced(step):
            with clock.region("data"):
                microbatches = next(batches)
            limit, keep = self.guard.loss_limit(), self.task.keep
            report = self.engine.train_step(microbatches, self.task.objective, recorder, limit, keep)
            phases = clock.read()
            cost = self.meter.values(n_samples, time.perf_counter() - start, phases)
        if recorder is not None:
            self._keep_times(recorder, len(microbatches))
        self.consumed_samples += n_samples
        busy_s = sum(seconds for kind, seconds in phases.items() if kind != "communication")
        noted = self.guard.after_step(report, microbatches, busy_s)
        values = self._values(report, {"global_batch": n_samples, **cost})
        return {**values, **noted, **self.task.observe(report)}

    def _traced(self, step: int) -> AbstractContextManager[None]:
        """Trace a step that `log.profile` names, on one rank of each pipeline stage."""
        if step not in self.config.log.profile or not self.mesh.stage.is_first:
            return nullcontext()
        name = f"step_{step:08d}_rank_{self.mesh.rank:05d}.json"
        return traced(self.engine, self.run_directory.path / "profile" / name)

    def _keep_times(self, recorder: Recorder, n_microbatches: int) -> None:
        """Write what the pipeline of rank 0 did, for `megascratch plan --times`."""
        timeline = recorder.gather(self.mesh.pp)
        if self.run_directory.writes:
            file = self.run_directory.path / f"pipeline_step_{self.engine.step}.json"
            file.write_text(times_text(timeline, self.engine.schedule(n_microbatches, backward=True)), encoding="utf-8")
            self.console.print(f"wrote {file}: see it with megascratch plan --times {file} --out pipeline.svg")

    def _values(self, report: StepReport, cost: Mapping[str, float | None]) -> dict[str, Any]:
        return {
            "step": self.engine.step,
            "tokens": self.consumed_samples * self.config.data.seq_length,
            "consumed_samples": self.consumed_samples,
            "loss": report.loss,
            "grad_norm": report.grad_norm,
            "lr": report.lr,
            **cost,
            "skipped": report.skipped,
            **({"loss_scale": report.loss_scale} if self.config.train.dtype == "fp16" else {}),
            **report.metrics,
            **self.gpu.read(),
        }

    def _validate(self, validation: Validation) -> dict[str, float]:
        """Return what the means over all validation batches are called and described by."""
        batches = validation.batches.steps(0, validation.n_steps, prefetch=0)
        return validation.describe(
            Totals.over([self.engine.evaluate(batch, validation.objective) for batch in batches])
        )

    def _agree(self, stop: StopSignal) -> tuple[bool, int, Vote]:
        """Return whether any rank was asked to stop, the peak memory of the fullest rank, and what saving is to do."""
        asked = stop.received or (self.mesh.rank == 0 and self.run_directory.stop_file.exists())
        vote = self.checkpoints.vote()
        own = [float(x) for x in (asked, peak_memory_bytes(self.mesh.device), vote.due, vote.writing)]
        most = comm.max_over(torch.tensor(own, dtype=torch.float64, device=self.mesh.device), self.mesh.world).tolist()
        return most[0] > 0, int(most[1]), Vote(due=most[2] > 0, writing=most[3] > 0)
