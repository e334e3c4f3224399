"""The one training loop: steps, validation, checkpoints, metrics, and an orderly end.

for each step: train ─ (validate) ─ log ─ (save) ─ asked to stop? save and leave with 75
"""

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from megascratch.config import Config
from megascratch.data.sampler import Batches
from megascratch.dist import comm
from megascratch.dist.launch import StopSignal
from megascratch.dist.mesh import Mesh
from megascratch.engine.engine import Engine, StepReport
from megascratch.engine.flops import peak_flops, token_flops
from megascratch.engine.gpu import GpuMonitor
from megascratch.engine.metrics import RunDirectory, describe_step
from megascratch.engine.objective import Objective
from megascratch.engine.state import save_engine
from megascratch.errors import EXIT_DONE, EXIT_STOPPED, MegascratchError
from megascratch.log import progress
from megascratch.pipeline import Recorder, times_text

_MOST_SKIPPED_IN_A_ROW = 50  # fp16 loss scaling needs 16 halvings from its start at the most; more is divergence


class DivergedError(MegascratchError):
    """Gradients stay not finite: training cannot go on."""


class Trainer:
    """Trains an engine on batches until the run is done or asked to stop.

    Args:
        engine: the model, loaded where it resumes.
        objective: what is minimised.
        train: this rank's batches.
        valid: validation batches, or None.
        token_bytes: bytes that each token id stands for, [v], for bits per byte; None leaves that metric out.
        run: the run directory.
        console: rank-aware.
        consumed_samples: where in the data the run stands.
    """

    def __init__(
        self,
        engine: Engine,
        objective: Objective,
        train: Batches,
        valid: Batches | None,
        token_bytes: np.ndarray | None,
        run: RunDirectory,
        console: Console,
        consumed_samples: int = 0,
    ) -> None:
        self.engine, self.objective, self.train, self.valid = engine, objective, train, valid
        self.token_bytes = None if token_bytes is None else torch.from_numpy(token_bytes)
        self.run_directory, self.console, self.consumed_samples = run, console, consumed_samples
        self.gpu = GpuMonitor(self.mesh.device)
        self.flops = token_flops(self.config.model, self.config.data.seq_length)
        cuda = self.mesh.device.type == "cuda"
        self.peak = peak_flops(torch.cuda.get_device_name(self.mesh.device)) if cuda else None
        self._skipped_in_a_row = 0

    @property
    def config(self) -> Config:
        return self.engine.config

    @property
    def mesh(self) -> Mesh:
        return self.engine.mesh

    def run(self) -> int:
        """Train to the end, or to `train.stop_step`, or until asked to stop.

        Returns: 0 when done, 75 when stopped by a signal or the stop file after a checkpoint was saved.

        Raises: DivergedError: if too many steps in a row had to be skipped.
        """
        train = self.config.train
        last = min(train.steps, train.stop_step or train.steps)
        stop, stopped = StopSignal(), False
        remaining = last - self.engine.step
        batches = self.train.steps(self.consumed_samples, max(0, remaining))
        saved_step = None
        with progress(self.console, "train", remaining, "steps") as advance:
            for microbatches in batches:
                values = self._step(microbatches)
                stopped = self._asked_to_stop(stop)
                due = self.config.eval.every and self.engine.step % self.config.eval.every == 0
                if self.valid is not None and (due or self.engine.step == train.steps):
                    values |= self._validate()
                self.run_directory.log(values)
                if self.engine.step % self.config.log.every == 0 or self.engine.step == last:
                    describe_step(values, self.console)
                advance(1)
                every = self.config.checkpoint.every
                if stopped or self.engine.step == last or (every and self.engine.step % every == 0):
                    saved_step = self._save()
                if stopped:
                    break
        self.run_directory.close()
        if stopped and self.engine.step < last:
            self.console.print(f"stopped after step {saved_step}; the same command resumes")
            return EXIT_STOPPED
        return EXIT_DONE

    def _step(self, microbatches: list[Any]) -> dict[str, Any]:
        """Run one step and return the values to log."""
        start = time.perf_counter()
        recorder = Recorder(self.mesh.device) if self.engine.step + 1 == self.config.log.pipeline_step else None
        report = self.engine.train_step(microbatches, self.objective, on_event=recorder)
        step_s = time.perf_counter() - start
        if recorder is not None:
            self._keep_times(recorder, len(microbatches))
        self.consumed_samples += self.config.train.global_batch
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if report.skipped else 0
        if self._skipped_in_a_row >= _MOST_SKIPPED_IN_A_ROW:
            raise DivergedError(
                f"the gradient was not finite in {self._skipped_in_a_row} steps in a row, up to step"
                f" {self.engine.step}: lower optim.lr, or resume from an earlier checkpoint"
            )
        return self._values(report, step_s)

    def _keep_times(self, recorder: Recorder, n_microbatches: int) -> None:
        """Write what the pipeline of rank 0 did, for `megascratch plan --times`."""
        timeline = recorder.gather(self.mesh.pp)
        if self.run_directory.writes:
            file = self.run_directory.path / f"pipeline_step_{self.engine.step}.json"
            file.write_text(times_text(timeline, self.engine.schedule(n_microbatches, backward=True)), encoding="utf-8")
            self.console.print(f"wrote {file}: see it with megascratch plan --times {file} --out pipeline.svg")

    def _values(self, report: StepReport, step_s: float) -> dict[str, Any]:
        train, seq_length = self.config.train, self.config.data.seq_length
        tokens_per_s = train.global_batch * seq_length / step_s
        peak = None if self.peak is None else self.peak * self.mesh.spec.world_size
        return {
            "step": self.engine.step,
            "tokens": self.consumed_samples * seq_length,
            "consumed_samples": self.consumed_samples,
            "loss": report.loss,
            "grad_norm": report.grad_norm,
            "lr": report.lr,
            "tokens_per_s": tokens_per_s,
            "mfu": None if peak is None else tokens_per_s * self.flops.causal / peak,
            "mfu_palm": None if peak is None else tokens_per_s * self.flops.palm / peak,
            "step_s": step_s,
            "skipped": report.skipped,
            **({"loss_scale": report.loss_scale} if train.dtype == "fp16" else {}),
            **report.metrics,
            **self.gpu.read(),
        }

    def _validate(self) -> dict[str, float]:
        """Return the mean validation loss in nats a token, and in bits a byte where token lengths are known."""
        assert self.valid is not None
        nats = weight = n_bytes = 0.0
        for microbatches in self.valid.steps(0, self.config.eval.batches, prefetch=0):
            totals = self.engine.evaluate(microbatches, self.objective)
            nats += totals.loss * totals.weight
            weight += totals.weight
            if self.token_bytes is not None:
                own = sum((self.token_bytes[m.labels] * m.loss_mask).double().sum() for m in microbatches)
                n_bytes += comm.sum_over(torch.as_tensor(own, device=self.mesh.device), self.mesh.dp).item()
        values = {"valid_loss": nats / weight}
        if n_bytes:
            values["valid_bits_per_byte"] = nats / math.log(2) / n_bytes
        return values

    def _asked_to_stop(self, stop: StopSignal) -> bool:
        """Return whether any rank was asked to stop; all ranks agree."""
        asked = stop.received or (self.mesh.rank == 0 and self.run_directory.stop_file.exists())
        flag = torch.tensor(float(asked), device=self.mesh.device)
        return comm.max_over(flag, self.mesh.world).item() > 0

    def _save(self) -> int:
        assert self.config.checkpoint.dir is not None
        path = save_engine(self.engine, Path(self.config.checkpoint.dir), self.consumed_samples)
        self.console.print(f"saved {path}")
        return self.engine.step
