"""A whole step as a recording, by a stand-in that records on the CPU what reaches the dispatcher.

The stand-in keeps to what a CUDA graph does: recording computes nothing, a replay does the same operations with the
same numbers on the same memory, and nothing asks the device for a value on the way. What a GPU adds (that every kernel
and every NCCL call is captured) can be tested on one alone.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, TypeVar
from unittest.mock import patch

import pytest
import torch
from layouts import Layout, Trained, local_weights, make_batches, make_config, make_engine, train_steps
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformer_engine_stand_in import transformer_engine

from megascratch.config import Config
from megascratch.dist.mesh import Mesh
from megascratch.dist.testing import RankPool
from megascratch.engine import Engine, next_token
from megascratch.engine.graph import StepGraph, cuda_step_graph
from megascratch.errors import ConfigError
from megascratch.nn.transformer_engine import DelayedScaling

T = TypeVar("T")

aten = torch.ops.aten
# What waits for the device's answer, or copies from the host's memory.
_ASKS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.is_nonzero, aten.lift_fresh}


def _storages(values: Any) -> set[int]:
    return {x.untyped_storage().data_ptr() for x in tree_leaves(values) if isinstance(x, Tensor)}


class Tape(TorchDispatchMode):
    """Writes down what is done, with its arguments, and where the results lie; does it again."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self.awaited: set[int] = set()  # where sums will be scattered to

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket not in _ASKS, f"{func} inside a recorded step"
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.c10d._reduce_scatter_base_:
            self.awaited.add(args[0].data_ptr())
        elif func.overloadpacket is aten.copy_ and args[0].data_ptr() in self.awaited:
            self.awaited.remove(args[0].data_ptr())  # gloo's own, while it is waited for; a replay waits itself
            return out
        if not func.is_view:
            self.calls.append((func, args, kwargs or {}, out))
        return out

    def forget_results(self) -> None:
        """Spoil what recording computed: no replay may find it."""
        for _, args, kwargs, out in self.calls:
            for x in tree_leaves(out):
                if isinstance(x, Tensor) and x.is_floating_point() and not _storages(x) & _storages((args, kwargs)):
                    x.fill_(torch.nan)

    @torch.no_grad()
    def replay(self) -> None:
        under_way: list[Any] = []
        for func, args, kwargs, out in self.calls:
            if func.namespace != "c10d":
                while under_way:
                    under_way.pop(0).wait()
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)
                elif hasattr(new, "wait"):
                    under_way.append(new)
        while under_way:
            under_way.pop(0).wait()


class Recorder:
    """Records on the CPU what an engine does, and undoes what that changed."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.recorded, self.replayed, self.warmed = engine, 0, 0, 0

    def warm_up(self, step: Callable[[], T]) -> T:
        self.warmed += 1
        return step()

    def _kept(self) -> list[Tensor]:
        optimizer = self.engine.optimizer
        buckets = [x for bucket in optimizer.buckets for x in (bucket.run, bucket.grads)]
        buckets += [bucket.values for bucket in optimizer.buckets if bucket.codes is None]
        codes = [bucket.codes for bucket in optimizer.buckets if bucket.codes is not None]
        buckets += [x for code in codes for x in (code.divided.whole, code.divided.run, code.units)]
        runs = [x for run in optimizer.runs for x in (run.values, run.remainder, *run.state.values()) if x is not None]
        recipe = self.engine.fp8
        return buckets + runs + ([recipe.history, recipe.scales] if isinstance(recipe, DelayedScaling) else [])

    def record(self, step: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        self.recorded += 1
        before = [x.clone() for x in self._kept()]
        tape = Tape()
        with tape:
            results = step()
        tape.forget_results()
        for x, was in zip(self._kept(), before, strict=True):
            x.copy_(was)

        def replay() -> None:
            self.replayed += 1
            tape.replay()

        return results, replay


def _as_on_a_gpu() -> AbstractContextManager[Any]:
    """Leave out what is done on a CPU alone: the head skips tokens that do not count, once it knows which those are."""
    return patch("megascratch.nn.loss._counting", lambda weights: None)


@pytest.fixture(autouse=True)
def _here_too() -> Iterator[None]:
    with _as_on_a_gpu():
        yield


def _recording(engine: Engine) -> Recorder:
    recorder = Recorder(engine)
    engine.graph = StepGraph(recorder)
    return recorder


def _require_equal(replayed: Trained, plain: Trained) -> None:
    assert repr(replayed.reports) == repr(plain.reports)  # as text, not-a-number equals itself
    for (name, _, _, got), (_, _, _, want) in zip(replayed.weights, plain.weights, strict=True):
        assert torch.equal(got, want), name


def _both(layout: Layout, train: dict[str, Any]) -> None:
    config = layout.config(**train)
    with _as_on_a_gpu(), transformer_engine():
        engine = make_engine(config)
        recorder = _recording(engine)
        plain = train_steps(make_engine(config), 6)
        _require_equal(train_steps(engine, 6), plain)
    assert (recorder.warmed, recorder.recorded, recorder.replayed) == (2, 1, 4)
    assert engine.optimizer.updates == 6
    assert len({report.lr for report in plain.reports}) > 3, "what a recording must not keep has to change"


_LAYOUTS = [
    (Layout("llama", {}, micro_batch=2), {}),
    (Layout("dropout", {}, "dropout", micro_batch=2), {}),
    (Layout("packed-recompute", {"recompute": "full"}, "gemma", packed=True), {}),
    (Layout("bf16", {}, "tied"), {"dtype": "bf16"}),
    (Layout("muon", {}, optim="muon"), {}),
    (Layout("fp8", {}, micro_batch=2), {"dtype": "fp8"}),
    (Layout("fp8-delayed", {}, micro_batch=2), {"dtype": "fp8", "fp8_recipe": "delayed"}),
    (Layout("dp2-zero1", {"dp": 2, "zero": 1}), {"dtype": "bf16"}),
    (Layout("dp2-zero1-codes", {"dp": 2, "zero": 1, "fp8_param_gather": True}, micro_batch=2), {"dtype": "fp8"}),
    (Layout("tp2-dp2-zero2", {"tp": 2, "dp": 2, "zero": 2}, "qwen"), {}),
    (Layout("tp2-muon", {"tp": 2, "dp": 2, "zero": 1}, optim="muon"), {}),
    (Layout("cp2-ring", {"cp": 2, "dp": 2}), {}),
]


@pytest.mark.parametrize(("layout", "train"), _LAYOUTS, ids=lambda given: getattr(given, "name", ""))
def test_a_replayed_run_is_the_plain_run_to_the_bit(layout: Layout, train: dict[str, Any], pool: RankPool) -> None:
    """New tokens, other samples' dropout, the learning rate and its corrections reach a recording through memory."""
    if layout.world == 1:
        _both(layout, train)
    else:
        pool.run(layout.world, _both, layout, train)


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed"])
def test_a_recording_quantises_its_own_weights(recipe: str) -> None:
    """Not those of an evaluation just before it."""

    def train(engine: Engine) -> list[Any]:
        batches, found = make_batches(engine.config, engine.mesh), []
        for step in range(5):
            found.append(engine.evaluate(batches.at(0), next_token).loss)
            found.append(engine.train_step(batches.at(8 * step), next_token))
        return found

    def config(cache: bool) -> Config:
        return Layout("fp8", {}, micro_batch=2).config(dtype="fp8", fp8_recipe=recipe, fp8_weight_cache=cache)

    with transformer_engine():
        engine = make_engine(config(cache=True))
        recorder = _recording(engine)
        assert train(engine) == train(make_engine(config(cache=False)))
    assert recorder.replayed == 3


def test_steps_that_are_not_taken_change_nothing_and_are_not_counted() -> None:
    """Decided on the device: a loss above a limit that changes, gradients that overflow while fp16 finds its scale."""

    def train(engine: Engine) -> Trained:
        batches, reports = make_batches(engine.config, engine.mesh), []
        for step in range(10):
            before = local_weights(engine)
            limit = 0.1 if step == 8 else 1e9 - step
            reports.append(engine.train_step(batches.at(8 * step), next_token, loss_limit=limit))
            same = all(torch.equal(now, was) for (*_, now), (*_, was) in zip(local_weights(engine), before))
            assert same == reports[-1].skipped
        return Trained(reports, [], local_weights(engine))

    config = make_config(dtype="fp16", steps=12)
    config = config.model_copy(
        update={"optim": config.optim.model_copy(update={"loss_scale": 2.0**24, "loss_scale_window": 2})}
    )
    plain = train(make_engine(config))
    skipped = [report.skipped for report in plain.reports]
    assert set(skipped[2:8]) == {True, False} and skipped[8], "overflows in replays, and a loss above the limit"
    assert len({report.loss_scale for report in plain.reports[2:]}) > 2, "what a recording must not keep has to change"
    engine = make_engine(config)
    recorder = _recording(engine)
    _require_equal(train(engine), plain)
    assert recorder.replayed == 8
    assert engine.optimizer.updates == skipped.count(False)


def test_the_stand_in_keeps_what_python_computed_and_hears_who_asks() -> None:
    """Else the tests above would pass with a learning rate that is fixed for ever."""
    engine, number = make_engine(make_config()), [2.0]
    results, replay = Recorder(engine).record(lambda: engine.optimizer.inputs.lr * number[0])
    for lr, number[0] in ((3.0, 5.0), (4.0, 7.0)):
        engine.optimizer.inputs.write(lr=lr, number=1)
        replay()
        assert results.item() == 2.0 * lr
    for ask in (lambda x: x.item(), lambda x: torch.tensor([1.0]), lambda x: x if x > 0 else -x, lambda x: x[x > 0]):
        with pytest.raises(AssertionError, match="inside a recorded step"):
            Recorder(engine).record(lambda ask=ask: ask(torch.ones(())))


def test_a_step_that_is_observed_or_only_evaluated_is_not_replayed() -> None:
    engine = make_engine(make_config())
    recorder = _recording(engine)
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
    assert phases["graph"] > 0 and "forward" not in phases and "optimizer" not in phases


def test_masters_joined_for_a_checkpoint_are_not_those_of_the_next_one() -> None:
    """A replay runs no Python that would forget them."""
    config = make_config(dtype="bf16")
    config = config.model_copy(update={"optim": config.optim.model_copy(update={"master_remainders": True})})
    engine = make_engine(config)
    _recording(engine)
    train_steps(engine, 4)
    saved = [run.master.clone() for run in engine.optimizer.runs]
    train_steps(engine, 1, consumed_samples=32)
    assert all(not torch.equal(run.master, was) for run, was in zip(engine.optimizer.runs, saved, strict=True))


def test_another_number_of_microbatches_is_our_mistake() -> None:
    engine = make_engine(make_config())
    _recording(engine)
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
@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_a_gpu_replays_what_it_recorded(optim: str) -> None:
    losses = []
    for cuda_graph in (False, True):
        config = make_config(optim=optim, dtype="fp32", cuda_graph=cuda_graph)
        engine = Engine(config, Mesh.serial(torch.device("cuda")))
        batches = make_batches(engine.config, engine.mesh)
        limits = [math.inf, math.inf, math.inf, 0.1, math.inf, math.inf]
        losses.append(
            [engine.train_step(batches.at(8 * i), next_token, loss_limit=limit).loss for i, limit in enumerate(limits)]
        )
        assert engine.optimizer.updates == 5
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
