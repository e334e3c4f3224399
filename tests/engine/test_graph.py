"""The step's forward and backward as a recording: buffers that stay, by a stand-in that records on the CPU.

The stand-in keeps to what a CUDA graph does: recording computes nothing, and replaying writes its results where the
recording left them. What a GPU adds (that every kernel is captured) can be tested on one alone.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from layouts import make_batches, make_config, make_engine, train_steps

from megascratch.engine import Engine, next_token
from megascratch.engine.graph import StepGraph, Sums, cuda_step_graph
from megascratch.errors import ConfigError


class Recorder:
    """Records on the CPU: undoes what tracing the function changed, and repeats it at each replay."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.recorded, self.replayed, self.warmed = engine, 0, 0, 0

    def warm_up(self, drive: Callable[[], Sums]) -> Sums:
        self.warmed += 1
        return drive()

    def record(self, drive: Callable[[], Sums]) -> tuple[Sums, Callable[[], None]]:
        self.recorded += 1
        before = [bucket.grads.clone() for bucket in self.engine.optimizer.buckets]
        sums = {name: torch.full_like(value, torch.nan) for name, value in drive().items()}
        for bucket, grads in zip(self.engine.optimizer.buckets, before):
            bucket.grads.copy_(grads)

        def replay() -> None:
            self.replayed += 1
            for name, value in drive().items():
                sums[name].copy_(value)

        return sums, replay


@pytest.mark.parametrize("model", ["llama", "dropout"])
def test_a_replayed_run_is_the_plain_run_to_the_bit(model: str) -> None:
    """New tokens and other samples' dropout reach a recording through its buffers; the learning rate comes after it."""
    config = make_config(model, micro_batch=2)
    plain = train_steps(make_engine(config), 6)
    engine = make_engine(config)
    recorder = Recorder(engine)
    engine.graph = StepGraph(recorder.warm_up, recorder.record)
    replayed = train_steps(engine, 6)
    assert (recorder.warmed, recorder.recorded, recorder.replayed) == (2, 1, 4)
    assert replayed.reports == plain.reports
    for (name, _, _, got), (_, _, _, want) in zip(replayed.weights, plain.weights, strict=True):
        assert torch.equal(got, want), name


def test_a_step_that_is_observed_or_only_evaluated_is_not_replayed() -> None:
    engine = make_engine(make_config())
    recorder = Recorder(engine)
    engine.graph = StepGraph(recorder.warm_up, recorder.record)
    train_steps(engine, 3)
    microbatches = make_batches(engine.config, engine.mesh).at(0)
    seen: list[Any] = []
    engine.train_step(microbatches, next_token, on_event=lambda action, starts: seen.append(action))
    engine.evaluate(microbatches, next_token)
    assert len(seen) == 2 * 2 * len(microbatches)
    assert recorder.replayed == 1
    engine.mesh.clock.read()
    engine.train_step(microbatches, next_token)
    phases = engine.mesh.clock.read()
    assert phases["graph"] > 0 and "forward" not in phases


def test_another_number_of_microbatches_is_our_mistake() -> None:
    engine = make_engine(make_config())
    recorder = Recorder(engine)
    engine.graph = StepGraph(recorder.warm_up, recorder.record)
    train_steps(engine, 3)
    with pytest.raises(ValueError, match="zip"):
        engine.train_step(make_batches(engine.config, engine.mesh).at(0)[:-1], next_token)


def test_a_cpu_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"train.cuda_graph = true +needs a GPU; this run is on the cpu +leave it out"
    ):
        cuda_step_graph(torch.device("cpu"))
    with pytest.raises(ConfigError, match="needs a GPU"):
        make_engine(make_config(cuda_graph=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that this torch can use")
def test_a_gpu_replays_what_it_recorded() -> None:
    from megascratch.dist.mesh import Mesh

    losses = []
    for cuda_graph in (False, True):
        engine = Engine(make_config(dtype="fp32", cuda_graph=cuda_graph), Mesh.serial(torch.device("cuda")))
        losses.append([report.loss for report in train_steps(engine, 6).reports])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
