"""Numbers that go wrong, ranks that differ or lag, and requests to stop."""

import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_table import EXACT, fault
from ground import Ground
from safetensors import safe_open
from tiny_run import losses, pretrain_on_ranks, records

from megascratch.checkpoint import read_state
from megascratch.config import Config
from megascratch.dist.launch import StopSignal
from megascratch.dist.testing import run_ranks
from megascratch.engine import pretrain
from megascratch.engine.engine import Engine
from megascratch.engine.guard import Guard
from megascratch.errors import MegascratchError
from megascratch.optim import Optimizer

NUMBERS, RANKS, STOPS = "Numbers", "Ranks that differ or lag", "Requests to stop"


def spoil_loss(ground: Ground, factor: float, steps: range) -> None:
    """Judge some steps as if their loss were so many times larger."""
    original = Guard.loss_limit

    def loss_limit(self: Guard) -> float:
        return original(self) / (factor if self.engine.step + 1 in steps else 1)

    ground.monkeypatch.setattr(Guard, "loss_limit", loss_limit)


def how_ranks_end(config: Config) -> str:
    """Train on ranks, and return the message that it ends with."""
    try:
        pretrain_on_ranks(config)
    except MegascratchError as error:
        return str(error)
    return "ended"


def spoilt_on_ranks(config: Config, value: float, steps: range, rank: int) -> str:
    """Train on ranks, one of which has a wrong gradient before it is summed."""
    calls = [0]

    def zero_grads(self: Optimizer) -> None:
        calls[0] += 1
        for bucket in self.buckets:
            bucket.zero_grads()
        if calls[0] in steps and self.mesh.rank == rank:
            self.buckets[0].grads[0] = value

    Optimizer.zero_grads = zero_grads  # type: ignore[method-assign]
    return how_ranks_end(config)


def flipped_weight(config: Config, rank: int) -> str:
    """Train on ranks; after step 2, one bit of a weight of one of them flips."""
    original = Engine.train_step

    def train_step(self: Engine, *arguments: Any, **options: Any) -> Any:
        report = original(self, *arguments, **options)
        if self.step == 2 and self.mesh.rank == rank:
            self.parameters()[3].data.view(-1).view(torch.int32)[5] ^= 1 << 12
        return report

    Engine.train_step = train_step  # type: ignore[method-assign]
    return how_ranks_end(config)


def slow_rank(config: Config, rank: int) -> str:
    """Train on ranks, one of which computes slowly; return what rank 0 says."""
    original = Engine._on_event

    def on_event(self: Engine, observer: Any, action: Any, starts: bool) -> None:
        original(self, observer, action, starts)
        if starts and self.mesh.rank == rank:
            time.sleep(0.05)

    Engine._on_event = on_event  # type: ignore[method-assign]
    file = Path(config.log.dir).parent / f"said_{os.getpid()}"
    saved = os.dup(2)
    with file.open("w") as said:
        os.dup2(said.fileno(), 2)
        try:
            pretrain_on_ranks(config)
        finally:
            sys.stderr.flush()
            os.dup2(saved, 2)
    return file.read_text()


def swapped_collectives(config: Config) -> None:
    """Train on ranks, one of which begins its second step with a collective that the others do not come to."""
    from megascratch.dist import comm

    original = Engine.train_step

    def train_step(self: Engine, *arguments: Any, **options: Any) -> Any:
        if self.step == 1 and self.mesh.rank == 1:
            comm.max_over(torch.zeros(3), self.mesh.data)
        return original(self, *arguments, **options)

    Engine.train_step = train_step  # type: ignore[method-assign]
    pretrain_on_ranks(config)


@fault(NUMBERS, "a gradient that is not finite in one step", "skipped: loss or gradient were not finite, or spiked")
def one_nan(ground: Ground) -> str:
    original, spoilt = Optimizer.step, [0]

    def step(self: Optimizer, *arguments: Any, **options: Any) -> Any:
        spoilt[0] += 1
        if spoilt[0] == 3:
            self.buckets[0].grads[0] = float("nan")
        return original(self, *arguments, **options)

    ground.monkeypatch.setattr(Optimizer, "step", step)
    config = ground.config()
    assert pretrain(config, None) == 0
    assert [record["skipped"] for record in records(config)] == [False, False, True, False, False, False]
    assert records(config)[-1]["skipped_steps"] == 1
    return ground.captured()


@fault(NUMBERS, "NaN on one rank of two", "ended")
def nan_on_one_rank(ground: Ground) -> str:
    config = ground.config(parallel={"dp": 2})
    said = run_ranks(2, spoilt_on_ranks, config, float("nan"), range(3, 4), 1)
    assert [record["skipped"] for record in records(config)] == [False, False, True, False, False, False]
    return said[0]


@fault(
    NUMBERS,
    "gradients that stay infinite",
    "in 2 steps in a row, from step 3 on, whose batch is in …/faults: lower optim.lr",
)
def stays_infinite(ground: Ground) -> str:
    config = ground.config(parallel={"dp": 2}, faults={"max_skipped": 2})
    said = run_ranks(2, spoilt_on_ranks, config, float("inf"), range(3, 99), 0)
    files = sorted((ground.folder / "run/faults").iterdir())
    assert [file.name for file in files] == [f"batch_of_step_00000003_dp_000{rank}.safetensors" for rank in range(2)]
    with safe_open(files[1], "pt") as batch:
        assert batch.get_tensor("0.sample_ids").tolist() == [9]
    assert (ground.folder / "run/checkpoints/latest").read_text() == "step_00000004\n"
    return said[1]


@fault(NUMBERS, "a loss spike, faults.spike_factor = 2", "skipped: loss or gradient were not finite, or spiked")
def spike(ground: Ground) -> str:
    spoil_loss(ground, 2.5, range(11, 12))
    config = ground.config(train={"steps": 12}, faults={"spike_factor": 2.0})
    assert pretrain(config, None) == 0
    assert [record["step"] for record in records(config) if record["skipped"]] == [11]
    return ground.captured()


@fault(NUMBERS, "a stop between losses that decide what a spike is", EXACT)
def spike_after_resume(ground: Ground) -> str:
    """The window is in the checkpoint: with it, step 11 is a spike for a run that was stopped after step 8 too."""
    spoil_loss(ground, 2.5, range(11, 12))
    sections = {"train": {"steps": 12}, "faults": {"spike_factor": 2.0}}
    (ground.folder / "whole").mkdir()
    whole = Ground(ground.trained, ground.folder / "whole", ground.monkeypatch, ground.captured)
    assert pretrain(whole.config(**sections), None) == 0
    stopped = ground.config(train={"steps": 12, "stop_step": 8}, faults={"spike_factor": 2.0})
    assert pretrain(stopped, None) == 0
    assert len(read_state(ground.folder / "run/checkpoints")["guard"]["recent"]) == 8
    assert pretrain(ground.config(**sections), None) == 0
    assert losses(stopped) == losses(whole.config(**sections))
    return EXACT


@fault(
    RANKS,
    "a bit of a weight flips on one replica of three",
    "after step 3: rank 2 on … differs in layers.… from the others",
)
def flipped_of_three(ground: Ground) -> str:
    config = ground.config(parallel={"dp": 3}, train={"global_batch": 6}, faults={"replicas_every": 3})
    config = config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"every": 0})})
    said = run_ranks(3, flipped_weight, config, 2)
    assert len(set(said)) == 1
    assert "rank 0" not in said[0]
    return said[0]


@fault(
    RANKS,
    "a bit of a weight flips on one replica of two",
    "rank 0 on … differs in … from its replicas; rank 1 on … differs in …",
)
def flipped_of_two(ground: Ground) -> str:
    return run_ranks(2, flipped_weight, ground.config(parallel={"dp": 2}, faults={"replicas_every": 3}), 1)[0]


@fault(
    RANKS,
    "a rank that computes slowly",
    "rank 1 on … is slow: … times as long for its last 3 steps as ranks with the same layers",
)
def straggler(ground: Ground) -> str:
    config = ground.config(parallel={"dp": 2}, faults={"stragglers_every": 3})
    return run_ranks(2, slow_rank, config, 1)[0]


@fault(
    RANKS,
    "collectives in another order, train.debug_collectives",
    "CollectiveError: … rank 0 step … at … rank 1 step … at …",
)
def swapped(ground: Ground) -> str:
    config = ground.config(parallel={"dp": 2}, train={"debug_collectives": True})
    with pytest.raises(AssertionError) as caught:
        run_ranks(2, swapped_collectives, config, timeout_s=20)
    return str(caught.value)


def ask_after(ground: Ground, step: int, ask: Any) -> None:
    """Ask the run to stop while it is in a step."""
    original = Engine.train_step

    def train_step(self: Engine, *arguments: Any, **options: Any) -> Any:
        if self.step + 1 == step:
            ask()
        return original(self, *arguments, **options)

    ground.monkeypatch.setattr(Engine, "train_step", train_step)


def stopped_by(ground: Ground, ask: Any) -> str:
    with ground.patch():
        ask_after(ground, 3, ask)
        assert pretrain(ground.config(), None) == 75
    assert (ground.folder / "run/checkpoints/latest").read_text() == "step_00000003\n"
    return ground.captured()


@fault(STOPS, "SIGTERM", "stopped after step 3; the same command resumes")
def terminated(ground: Ground) -> str:
    return stopped_by(ground, lambda: os.kill(os.getpid(), signal.SIGTERM))


@fault(STOPS, "SIGUSR1, as Slurm sends it, and the same command again", EXACT)
def preempted(ground: Ground) -> str:
    with ground.patch() as patched:
        original = Engine.train_step

        def train_step(self: Engine, *arguments: Any, **options: Any) -> Any:
            if self.step == 2:
                os.kill(os.getpid(), signal.SIGUSR1)
            return original(self, *arguments, **options)

        patched.setattr(Engine, "train_step", train_step)
        assert pretrain(ground.config(), None) == 75
    return ground.resumes()


@fault(STOPS, "the file `stop` in the run directory", "stopped after step 3; the same command resumes")
def stop_file(ground: Ground) -> str:
    return stopped_by(ground, lambda: (ground.folder / "run/stop").touch())


def too_slow(said: Path) -> None:
    """Be asked to stop, and take longer than the recipe allows."""
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 2)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    StopSignal(0.1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(10)


@fault(STOPS, "a run that does not save in time", "asked to stop, and not saved within checkpoint.deadline_s = 0.1 s")
def too_late(ground: Ground) -> str:
    said = ground.folder / "said"
    child = multiprocessing.get_context("forkserver").Process(target=too_slow, args=(said,))
    child.start()
    child.join()
    assert child.exitcode == 1
    return said.read_text()
