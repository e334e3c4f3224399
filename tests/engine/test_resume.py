"""Resume anywhere: 3 steps, a checkpoint, 3 steps on another layout equal 6 steps on one, sample for sample."""

import functools
import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import (
    GIVEN,
    GLOBAL_BATCH,
    Layout,
    Trained,
    make_config,
    make_engine,
    run_layout,
    train_steps,
    whole_weights,
)
from matrix import matrix

from megascratch.config import Config
from megascratch.dist.testing import RankPool
from megascratch.engine.state import load_engine, save_engine
from megascratch.errors import CheckpointError, ConfigError

ONE = Layout("one", {}, "tied")


@functools.cache
def pairs() -> tuple[tuple[Layout, Layout, Config, Config], ...]:
    """Draw pairs of layouts from the matrix: (saved on, resumed on) and their configurations, with one model.

    Every value of every factor is saved on and resumed on; every schedule and ZeRO stage goes into every ZeRO stage.
    """
    layouts = [*matrix()[0], *GIVEN, ONE]
    drawn = list(itertools.product(layouts, layouts))
    random.Random(5).shuffle(drawn)
    goals: set[tuple[Any, ...]] = set()
    kept = []
    for least in (8, 6, 4, 2, 1):  # pairs that bring much first
        for saved, resumed in drawn:
            gain = _goals(saved, resumed) - goals
            if len(gain) < least or saved.packed != resumed.packed:
                continue
            n_layers = max(saved.n_layers, resumed.n_layers)
            try:
                configs = [
                    make_config(saved.model, layout.parallel, layout.micro_batch, layout.packed, n_layers, saved.optim)
                    for layout in (saved, resumed)
                ]
            except ConfigError:  # the second layout cannot have the first one's model
                continue
            goals |= gain
            kept.append((saved, resumed, *configs))
    return tuple(kept)


def _goals(saved: Layout, resumed: Layout) -> set[tuple[Any, ...]]:
    zero = resumed.parallel.get("zero", 0)
    return {
        *(("from", *item) for item in saved.parallel.items() if item[0] != "layers_per_stage"),
        *(("to", *item) for item in resumed.parallel.items() if item[0] != "layers_per_stage"),
        ("model", saved.model),
        ("optim", saved.optim, zero),
        (saved.parallel.get("schedule"), zero),
        (saved.parallel.get("zero", 0), zero),
    }


def _train_and_save(config: Config, root: Path) -> Trained:
    engine = make_engine(config)
    trained = train_steps(engine, 3)
    save_engine(engine, root, consumed_samples=3 * GLOBAL_BATCH)
    return trained


def _load_and_train(config: Config, root: Path) -> Trained:
    engine = make_engine(config)
    consumed_samples = load_engine(engine, root)
    assert engine.step == 3
    return train_steps(engine, 3, consumed_samples)


@functools.cache
def six_steps(model: str, packed: bool = False, n_layers: int = 4, optim: str = "adamw") -> Trained:
    torch.set_num_threads(1)
    return run_layout(make_config(model, packed=packed, n_layers=n_layers, optim=optim), 6)


def _global_ids(ranks: list[Trained]) -> list[list[int]]:
    """The samples of each step over all ranks; ranks that differ along tp or pp read the same ones."""
    return [sorted({i for trained in ranks for i in trained.sample_ids[step]}) for step in range(3)]


@pytest.mark.parametrize(
    ("saved", "resumed", "first", "second"), pairs(), ids=[f"{one.name} to {two.name}" for one, two, *_ in pairs()]
)
def test_a_run_goes_on_as_if_it_had_not_stopped(
    saved: Layout, resumed: Layout, first: Config, second: Config, pool: RankPool, tmp_path: Path
) -> None:
    reference = six_steps(saved.model, saved.packed, first.model.n_layers, saved.optim)
    before = pool.run(saved.world, _train_and_save, first, tmp_path)
    after = pool.run(resumed.world, _load_and_train, second, tmp_path)
    for ranks, steps in ((before, range(3)), (after, range(3, 6))):
        for got, want in zip(ranks[0].reports, (reference.reports[step] for step in steps), strict=True):
            assert got.loss == pytest.approx(want.loss, rel=1e-9)
            assert got.grad_norm == pytest.approx(want.grad_norm, rel=1e-9)
            assert got.lr == want.lr
        assert _global_ids(ranks) == [list(range(s * GLOBAL_BATCH, (s + 1) * GLOBAL_BATCH)) for s in steps]
    weights = whole_weights(after)
    for name, want in whole_weights([reference]).items():
        torch.testing.assert_close(weights[name], want, rtol=1e-8, atol=1e-11)


def test_the_same_layout_resumes_bit_for_bit(tmp_path: Path) -> None:
    config = make_config("dropout")
    before, after = _train_and_save(config, tmp_path), _load_and_train(config, tmp_path)
    reference = six_steps("dropout")
    assert before.reports + after.reports == reference.reports
    for (name, _, _, got), (_, _, _, want) in zip(after.weights, reference.weights, strict=True):
        assert torch.equal(got, want), name


def _grow(parallel: dict[str, Any]) -> Config:
    return make_config("tied", parallel, rampup_batch_size=(2, 2, 14), n_layers=2)


def _grown(config: Config, root: Path, steps: range) -> Trained:
    """Train some steps with a batch that grows, from the checkpoint that the steps before them left."""
    engine = make_engine(config)
    consumed = load_engine(engine, root) if steps.start else 0
    assert (engine.step, consumed) == (steps.start, config.train.samples_of(steps.start))
    trained = train_steps(engine, len(steps), consumed)
    save_engine(engine, root, config.train.samples_of(steps.stop))
    return trained


def test_a_batch_that_grows_goes_on_under_another_layout(pool: RankPool, tmp_path: Path) -> None:
    """Batches of 2 2 2 | 4 6 8 samples, stopped where the line is."""
    reference = run_layout(_grow({}), 6)
    assert [len(ids) for ids in reference.sample_ids] == [2, 2, 2, 4, 6, 8]
    before = pool.run(4, _grown, _grow({"dp": 2, "tp": 2, "zero": 1}), tmp_path, range(3))
    after = pool.run(4, _grown, _grow({"pp": 2, "dp": 2, "schedule": "zb-h1"}), tmp_path, range(3, 6))
    reports = [*before[0].reports, *after[0].reports]
    for got, want in zip(reports, reference.reports, strict=True):
        assert (got.loss, got.grad_norm) == pytest.approx((want.loss, want.grad_norm), rel=1e-9)
        assert got.lr == want.lr
    assert _global_ids(before) + _global_ids(after) == [sorted(ids) for ids in reference.sample_ids]
    weights = whole_weights(after)
    for name, want in whole_weights([reference]).items():
        torch.testing.assert_close(weights[name], want, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("dtype", ["fp64", "bf16"])
def test_an_optimizer_goes_on_in_host_memory_and_back(dtype: str, tmp_path: Path) -> None:
    here, away = (make_config("llama", {"offload_optimizer": away}, dtype=dtype, n_layers=2) for away in (False, True))
    reference = run_layout(here, 6)
    for number, (first, second) in enumerate(((here, away), (away, here))):
        before, after = (
            run(config, tmp_path / str(number)) for run, config in ((_train_and_save, first), (_load_and_train, second))
        )
        assert before.reports + after.reports == reference.reports
        for (name, *_, got), (_, *_, want) in zip(after.weights, reference.weights, strict=True):
            assert torch.equal(got, want), name


def test_another_model_is_refused(tmp_path: Path) -> None:
    _train_and_save(make_config("llama"), tmp_path)
    with pytest.raises(CheckpointError, match=r"model\.tie_embeddings = True +must be False, as in the checkpoint"):
        _load_and_train(make_config("tied"), tmp_path)


def _with_remainders(config: Config) -> Config:
    return config.model_copy(update={"optim": config.optim.model_copy(update={"master_remainders": True})})


def test_masters_and_remainders_resume_each_other(pool: RankPool, tmp_path: Path) -> None:
    """Their masters agree bit for bit; the models' weights but for ties, which the two round differently."""
    whole = make_config("tied", dtype="bf16", n_layers=2)
    divided = make_config("tied", {"dp": 2, "zero": 1}, dtype="bf16", n_layers=2)
    straight = run_layout(whole, 6).reports
    for first, then in ((whole, _with_remainders(divided)), (_with_remainders(whole), divided)):
        root = tmp_path / str(first.optim.master_remainders)
        reports = _train_and_save(first, root).reports + pool.run(2, _load_and_train, then, root)[0].reports
        for got, want in zip(reports, straight, strict=True):
            assert got.loss == pytest.approx(want.loss, rel=1e-3)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_keeps_its_float32_masters(dtype: str, tmp_path: Path) -> None:
    """bf16 loses a small update when it is rounded into the weight; a resumed run must not."""
    config = make_config("tied", dtype=dtype)
    train_steps_saved = _train_and_save(config, tmp_path)
    resumed = _load_and_train(config, tmp_path)
    straight = run_layout(config, 6)
    assert train_steps_saved.reports + resumed.reports == straight.reports
