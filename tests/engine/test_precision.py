"""What the optimizer keeps in bfloat16 is the same on every layout, and goes from one precision into another."""

from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import (
    GLOBAL_BATCH,
    Trained,
    local_weights,
    make_config,
    make_engine,
    run_layout,
    train_steps,
    whole_weights,
)

from megascratch.checkpoint import Reader, find
from megascratch.config import Config
from megascratch.dist.testing import RankPool
from megascratch.engine.state import load_engine, save_engine

N_STEPS = 4
AVERAGES = {"exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16"}
NARROW = {**AVERAGES, "main_grads_dtype": "bf16"}
IN_TEN_BYTES = {**NARROW, "master_remainders": True}


def config_of(keys: dict[str, Any], parallel: dict[str, Any] | None = None, **others: Any) -> Config:
    """Without clipping, which would make every weight depend on the last bit of a norm."""
    config = make_config(parallel=parallel, **{"dtype": "bf16", "n_layers": 2, **others})
    return config.model_copy(update={"optim": config.optim.model_copy(update={"clip": 0.0, **keys})})


def run_on(pool: RankPool, config: Config) -> list[Trained]:
    world = (config.parallel.dp or 1) * config.parallel.tp * config.parallel.cp * config.parallel.pp
    return pool.run(world, run_layout, config, N_STEPS)


def assert_bitwise(one: list[Trained], other: list[Trained]) -> None:
    """The losses of all steps, and the weights. Norms are sums of float32 sums, which ZeRO divides elsewhere."""
    assert [report.loss for report in one[0].reports] == [report.loss for report in other[0].reports]
    wanted = whole_weights(other)
    assert all(torch.equal(weight, wanted[name]) for name, weight in whole_weights(one).items())


ZERO = [{"dp": 2, "zero": stage} for stage in (0, 1, 2, 3)]
EXPERTS = [{"dp": 2, "ep": 2}, {"dp": 2, "ep": 2, "zero": 1}]


# Layouts that sum gradients in one order: that of the micro-batches, or of two ranks with one micro-batch each.
@pytest.mark.parametrize(
    ("keys", "others", "layouts"),
    [
        (IN_TEN_BYTES, {"micro_batch": 2}, [{}, {"pp": 2}, {"pp": 2, "schedule": "zb-h1"}]),
        (IN_TEN_BYTES, {"micro_batch": 4}, [*ZERO, {"dp": 2, "zero": 3, "offload_parameters": True}]),
        (IN_TEN_BYTES, {"micro_batch": 4, "model": "moe"}, EXPERTS),
        (IN_TEN_BYTES, {"micro_batch": 2}, [{"deterministic_dp": True}, {"dp": 2, "deterministic_dp": True}]),
        (NARROW, {"micro_batch": 4}, [{}, {"offload_optimizer": True}]),
        (NARROW, {"micro_batch": 2, "optim": "muon"}, [{}, {"pp": 2}]),
        (AVERAGES, {"micro_batch": 2, "dtype": "fp16"}, [{}, {"pp": 2}]),
    ],
)
def test_layouts_that_add_in_one_order_agree_bit_for_bit(
    keys: dict[str, Any], others: dict[str, Any], layouts: list[dict[str, Any]], pool: RankPool
) -> None:
    first, *rest = (run_on(pool, config_of(keys, layout, **others)) for layout in layouts)
    for other in rest:
        assert_bitwise(other, first)
    wide = run_on(pool, config_of({}, layouts[0], **others))
    assert wide[0].reports != first[0].reports, "narrow numbers must have been at work"


@pytest.mark.parametrize(
    "parallel", [{"tp": 2, "zero": 1}, {"cp": 2, "zero": 3}, {"tp": 2, "pp": 2}, {"dp": 2, "zero": 2}]
)
def test_averages_in_bf16_beside_a_float32_model_agree_on_every_layout(
    parallel: dict[str, Any], pool: RankPool
) -> None:
    """But where the last bit of a gradient decides how an average is rounded: far less than what bf16 changes."""
    one, wide = (whole_weights([run_layout(config_of(keys, dtype="fp32"), N_STEPS)]) for keys in (AVERAGES, {}))
    got = whole_weights(run_on(pool, config_of(AVERAGES, parallel, dtype="fp32")))
    for name, want in one.items():
        assert (got[name] - want).norm() < 0.1 * (wide[name] - want).norm(), name


@pytest.mark.parametrize("parallel", [{"tp": 2}, {"cp": 2, "zero": 1}])
def test_gradients_in_bf16_are_summed_over_tp_and_cp(parallel: dict[str, Any], pool: RankPool) -> None:
    want = run_layout(config_of(IN_TEN_BYTES), N_STEPS).reports
    got = run_on(pool, config_of(IN_TEN_BYTES, parallel))[0].reports
    for mine, theirs in zip(got, want, strict=True):
        assert (mine.loss, mine.grad_norm) == pytest.approx((theirs.loss, theirs.grad_norm), rel=1e-2)


def state_of(config: Config, root: Path, resume: bool) -> dict[str, torch.Tensor]:
    """Train, or take over a checkpoint, and return the state that a new checkpoint holds, a copy."""
    engine = make_engine(config)
    if resume:
        load_engine(engine, root)
    else:
        train_steps(engine, 2)
        save_engine(engine, root, consumed_samples=2 * GLOBAL_BATCH)
    state = {f"{part.kind}/{part.spec.name}": part.tensor.clone() for part in engine.optimizer.state_parts()}
    return state | {f"weight/{name}": weight.reshape(-1) for name, _, _, weight in local_weights(engine)}


WITHOUT_MASTERS = {"master_weights": False}


@pytest.mark.parametrize(
    ("saved", "resumed"),
    [
        ({}, IN_TEN_BYTES),
        (IN_TEN_BYTES, {}),
        (AVERAGES, NARROW),
        (WITHOUT_MASTERS, {}),
        (WITHOUT_MASTERS, IN_TEN_BYTES),
        (IN_TEN_BYTES, WITHOUT_MASTERS),
    ],
)
def test_a_checkpoint_has_averages_as_they_are_kept_and_fills_those_of_another_precision(
    saved: dict[str, Any], resumed: dict[str, Any], tmp_path: Path
) -> None:
    """Widened exactly or rounded once; the float32 weights go over bit for bit, or are the model's."""
    before = state_of(config_of(saved), tmp_path, resume=False)
    after = state_of(config_of(resumed), tmp_path, resume=True)
    for name, loaded in after.items():
        kept = before.get(name, before[name.replace("master/", "weight/")])  # which has no padding
        assert torch.equal(loaded[: len(kept)], kept.to(loaded.dtype)), name
    stored = Reader(find(tmp_path)).manifest.tensors
    dtypes = {name.split("/")[1]: record.dtype for name, record in stored.items() if name.startswith("optim/")}
    average = "BF16" if saved else "F32"
    masters = {} if saved == WITHOUT_MASTERS else {"master": "F32"}
    assert dtypes == {**masters, "exp_avg": average, "exp_avg_sq": average}
    averages = {tensor.dtype for name, tensor in after.items() if name.startswith("exp_avg")}
    assert averages == {torch.bfloat16 if resumed else torch.float32}


def test_a_run_in_ten_bytes_goes_on_bit_for_bit(tmp_path: Path) -> None:
    config = config_of(IN_TEN_BYTES)
    engine = make_engine(config)
    before = train_steps(engine, 2)
    save_engine(engine, tmp_path, consumed_samples=2 * GLOBAL_BATCH)
    again = make_engine(config)
    after = train_steps(again, 2, load_engine(again, tmp_path))
    assert before.reports + after.reports == run_layout(config, 4).reports
