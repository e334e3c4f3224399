"""Resume anywhere: 3 steps, a checkpoint, 3 steps on another layout equal 6 steps on one, sample for sample."""

import functools
from pathlib import Path

import pytest
import torch
from layouts import (
    BY_NAME,
    GLOBAL_BATCH,
    Layout,
    Trained,
    make_config,
    make_engine,
    run_layout,
    train_steps,
    whole_weights,
)

from megascratch.config import Config
from megascratch.dist.testing import run_ranks
from megascratch.engine.state import load_engine, save_engine
from megascratch.errors import CheckpointError

ONE = Layout("one", {}, "tied")

# (saved on, resumed on); all with the model of the pair's first name below.
PAIRS = [
    ("one", "tp2-pp2-dp2-zero1"),
    ("tp2-pp2-dp2-zero1", "one"),
    ("tp2", "dp4-zero1"),
    ("dp4-zero1", "tp2-pp2"),
    ("pp2-gpipe", "pp2-vp2-interleaved"),
    ("pp2-vp2-interleaved", "tp2-dp2-zero1"),
    ("tp2-dp2-zero1", "pp4-1f1b-recompute"),
    ("dp2-zero1-mb2", "dp2"),
    ("tp4-qwen", "pp2-dp2-zero1-gpipe"),
    ("tp2-no-sp", "tp2-pp2-vp2-no-sp"),
    ("pp2-zb-v-tied", "pp4-zb-h1"),
    ("pp2-dp2-zero1-dualpipe", "pp4-balanced"),
    ("pp2-dp2-dualpipe-v", "pp2-dualpipe-tied"),
    ("dp4-ep2", "tp2-pp2-ep2-zb-h1-recompute"),
    ("pp2-vp2-dp4-ep4-zero1-selective", "tp2-no-sp-moe"),
    ("tp2-cp2-dp2-zero1-muon", "dp4-zero1-muon"),
]


def _layout(name: str) -> Layout:
    return ONE if name == "one" else BY_NAME[name]


def _config(name: str, model: str) -> Config:
    layout = _layout(name)
    return make_config(model, layout.parallel, layout.micro_batch, optim=layout.optim)


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
def six_steps(model: str, optim: str = "adamw") -> Trained:
    torch.set_num_threads(1)
    return run_layout(make_config(model, optim=optim), 6)


def _global_ids(ranks: list[Trained]) -> list[list[int]]:
    """The samples of each step over all ranks; ranks that differ along tp or pp read the same ones."""
    return [sorted({i for trained in ranks for i in trained.sample_ids[step]}) for step in range(3)]


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_a_run_goes_on_as_if_it_had_not_stopped(first: str, second: str, tmp_path: Path) -> None:
    model = "tied" if _layout(first).model in ("tied", "llama") else _layout(first).model
    reference = six_steps(model, _layout(first).optim)
    before = run_ranks(_layout(first).world, _train_and_save, _config(first, model), tmp_path)
    after = run_ranks(_layout(second).world, _load_and_train, _config(second, model), tmp_path)
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
    config = _config("one", "dropout")
    before, after = _train_and_save(config, tmp_path), _load_and_train(config, tmp_path)
    reference = six_steps("dropout")
    assert before.reports + after.reports == reference.reports
    for (name, _, _, got), (_, _, _, want) in zip(after.weights, reference.weights, strict=True):
        assert torch.equal(got, want), name


def test_another_model_is_refused(tmp_path: Path) -> None:
    _train_and_save(_config("one", "llama"), tmp_path)
    with pytest.raises(CheckpointError, match=r"model\.tie_embeddings = True +must be False, as in the checkpoint"):
        _load_and_train(_config("one", "tied"), tmp_path)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_keeps_its_float32_masters(dtype: str, tmp_path: Path) -> None:
    """bf16 loses a small update when it is rounded into the weight; a resumed run must not."""
    config = make_config("tied", dtype=dtype)
    train_steps_saved = _train_and_save(config, tmp_path)
    resumed = _load_and_train(config, tmp_path)
    straight = run_layout(config, 6)
    assert train_steps_saved.reports + resumed.reports == straight.reports
