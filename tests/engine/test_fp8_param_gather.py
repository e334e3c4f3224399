"""Weights of linear layers gathered in fp8: the bits of gathering them in bf16, at half of the bytes."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from layouts import Layout, Trained, local_weights, make_batches, make_engine, train_steps
from torch import Tensor

from megascratch.align.generator import Generator
from megascratch.config import Config, config_from_dict
from megascratch.dist import comm
from megascratch.dist.layout import spec_of
from megascratch.dist.mesh import Axis
from megascratch.dist.testing import RankPool
from megascratch.engine import next_token
from megascratch.engine.memory import MemoryModel
from megascratch.engine.state import load_engine, load_weights, save_engine
from megascratch.nn import Placement
from megascratch.nn.fp8 import FORWARD, Quantized, quantize
from megascratch.optim.codes import Codes, quantize_all


def _config(layout: Layout, in_codes: bool, **train: Any) -> Config:
    """Return a layout's run in fp8, with sides that its products take."""
    raw = layout.config(dtype="bf16").model_dump(exclude_none=True)
    return config_from_dict(
        {
            **raw,
            "model": {**raw["model"], "ffn_hidden": 64},
            "parallel": {**raw["parallel"], "fp8_param_gather": in_codes},
            "train": {**raw["train"], "dtype": "fp8", **train},
        }
    )


def _require_equal(got: Trained, want: Trained) -> None:
    assert got.reports == want.reports
    for (name, _, box, values), (_, _, wanted_box, wanted) in zip(got.weights, want.weights, strict=True):
        assert box == wanted_box
        assert torch.equal(values, wanted), name


def _compare(layout: Layout, train: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    trained, evaluated = [], []
    for in_codes in (True, False):
        engine = make_engine(_config(layout, in_codes, **train))
        first = engine.evaluate(make_batches(engine.config, engine.mesh).at(0), next_token)
        trained.append(train_steps(engine, 2))
        evaluated.append((first, engine.evaluate(make_batches(engine.config, engine.mesh).at(0), next_token)))
        assert any(bucket.codes is not None for bucket in engine.optimizer.buckets) == in_codes
    _require_equal(*trained)
    assert evaluated[0] == evaluated[1]
    assert evaluated[0][0] != evaluated[0][1]


_LAYOUTS = [
    (Layout("dp2-zero1", {"dp": 2, "zero": 1}), {}),
    (Layout("tp2-dp2-zero2", {"tp": 2, "dp": 2, "zero": 2}), {}),
    (Layout("dp2-zero3-full", {"dp": 2, "zero": 3, "recompute": "full"}), {}),
    (Layout("pp2-dp2-zero3-zb", {"pp": 2, "dp": 2, "zero": 3, "schedule": "zb-h1"}), {}),
    (Layout("pp2-vp2-dp2-zero1", {"pp": 2, "vp": 2, "dp": 2, "zero": 1}), {"fp8_weight_cache": False}),
    (Layout("cp2-dp2-zero2", {"cp": 2, "dp": 2, "zero": 2}, micro_batch=2), {}),
    (Layout("pp2-dp2-dualpipe", {"pp": 2, "dp": 2, "schedule": "dualpipe", "zero": 1}), {}),
    (Layout("dp4-zero3-by2", {"dp": 4, "zero": 3, "zero_ranks": 2}), {}),
    (Layout("dp4-zero1-by2-ahead", {"dp": 4, "zero": 1, "zero_ranks": 2}, "mtp"), {}),
    (Layout("dp2-zero3-away", {"dp": 2, "zero": 3, "offload_parameters": True}), {}),
    (Layout("dp2-zero1-away", {"dp": 2, "zero": 1, "offload_optimizer": True}), {}),
    (Layout("dp2-zero1-muon", {"dp": 2, "zero": 1}, optim="muon"), {}),
    (Layout("dp2-ep2-zero1", {"dp": 2, "ep": 2, "zero": 1}, "moe-capacity"), {}),
]


@pytest.mark.parametrize(("layout", "train"), _LAYOUTS, ids=lambda given: getattr(given, "name", ""))
def test_a_run_is_that_with_values_gathered_to_the_bit(layout: Layout, train: dict[str, Any], pool: RankPool) -> None:
    pool.run(layout.world, _compare, layout, train)


def _sent(in_codes: bool, zero: int) -> tuple[int, int, int]:
    """Bytes that a step gathers of weights; of values that are whole after it; and of codes."""
    engine = make_engine(_config(Layout("dp2", {"dp": 2, "zero": zero}), in_codes))
    start, sent = comm.start_all_gather, 0

    def counted(buffer: Tensor, part: Tensor, axis: Axis) -> Any:
        nonlocal sent
        sent += part.nbytes
        return start(buffer, part, axis)

    engine.optimizer.overlap.settle()
    with patch.object(comm, "start_all_gather", counted):
        engine.train_step(make_batches(engine.config, engine.mesh).at(0), next_token)
    buckets = engine.optimizer.buckets
    codes = [bucket.codes.divided.whole for bucket in buckets if bucket.codes is not None]
    values = sum(bucket.values.untyped_storage().nbytes() for bucket in buckets)
    return sent, values, sum(whole.untyped_storage().nbytes() for whole in codes)


@pytest.mark.parametrize("zero", [1, 3])
def test_half_of_the_bytes_travel(zero: int, pool: RankPool) -> None:
    """Of 4 layers of 12,288 linear weights: this rank's half, in one byte for two; in ZeRO-3 for every pass."""
    linear, passes = 4 * 12_288, 8 if zero == 3 else 1  # forward and backward of 4 micro-batches
    values, codes = pool.run(2, _sent, False, zero)[0], pool.run(2, _sent, True, zero)[0]
    assert values[0] - codes[0] == passes * linear // 2
    if zero == 1:
        assert (values[1] - codes[1], codes[2]) == (2 * linear, linear)
    else:
        assert codes[1:] == (9 * 32 * 2, 0), "norms alone are whole"


def _resume(folder: Path, saved_in_codes: bool) -> None:
    layout = Layout("dp2-zero1", {"dp": 2, "zero": 1})
    engine = make_engine(_config(layout, saved_in_codes))
    train_steps(engine, 2)
    path = save_engine(engine, folder, 16)
    want = train_steps(engine, 2, consumed_samples=16)
    for zero in (1, 3):
        for in_codes in (True, False):
            other = make_engine(_config(Layout("other", {"dp": 2, "zero": zero}), in_codes))
            train_steps(other, 1)
            assert load_engine(other, path) == 16
            resumed = train_steps(other, 2, consumed_samples=16)
            if (zero, in_codes) != (3, True):  # the first of its stage, which adds gradients up in another order
                _require_equal(resumed, want)
            want = resumed


@pytest.mark.parametrize("saved_in_codes", [True, False])
def test_resumed_with_and_without(saved_in_codes: bool, tmp_path: Path, pool: RankPool) -> None:
    pool.run(2, _resume, tmp_path, saved_in_codes)


def _loaded(folder: Path) -> None:
    """Weights alone, of another run: their codes are those of the new values."""
    layout = Layout("dp2-zero1", {"dp": 2, "zero": 1})
    teacher = make_engine(_config(layout, False))
    train_steps(teacher, 2)
    path = save_engine(teacher, folder, 16)
    batches = make_batches(teacher.config, teacher.mesh).at(0)
    want, weights = teacher.evaluate(batches, next_token), local_weights(teacher)
    for zero in (1, 3):
        engine = make_engine(_config(Layout("other", {"dp": 2, "zero": zero}), True))
        assert engine.evaluate(batches, next_token) != want
        load_weights(engine, path)
        assert engine.evaluate(batches, next_token) == want
        assert all(torch.equal(a[-1], b[-1]) for a, b in zip(local_weights(engine), weights, strict=True))
        assert engine.evaluate(batches, next_token) == want


def test_loaded_weights_are_quantised_anew(tmp_path: Path, pool: RankPool) -> None:
    pool.run(2, _loaded, tmp_path)


def _handed_over(zero: int) -> None:
    """What generates on the weights in training, and adapters beside weights that do not learn."""
    engine = make_engine(_config(Layout("tp2-dp2", {"tp": 2, "dp": 2, "zero": zero}), True))
    generator = Generator(engine, tp=2)
    train_steps(engine, 1)
    generator.sync()
    theirs = {spec_of(param).name: param for param in generator.stage.parameters()}
    with engine.gathered():
        assert all(torch.equal(theirs[spec_of(param).name], param) for param in engine.parameters())


@pytest.mark.parametrize("zero", [2, 3])
def test_whoever_wants_the_values_gets_them(zero: int, pool: RankPool) -> None:
    pool.run(4, _handed_over, zero)


def _adapted() -> None:
    trained = []
    for in_codes in (True, False):
        raw = _config(Layout("dp2", {"dp": 2, "zero": 1}), in_codes).model_dump(exclude_none=True)
        engine = make_engine(config_from_dict({**raw, "lora": {"rank": 16, "alpha": 32.0}}))
        trained.append(train_steps(engine, 2))
        names = [span.spec.name for bucket in engine.optimizer.buckets if bucket.codes for span in bucket.spans]
        assert bool(names) == in_codes and all("adapter" in name for name in names)
    _require_equal(*trained)


def test_adapters_travel_beside_weights_that_stay(pool: RankPool) -> None:
    pool.run(2, _adapted)


def _parts(whole: Tensor, cuts: list[int], bounds: list[tuple[int, int]]) -> list[Codes]:
    axis = Axis("shard")
    return [
        Codes(bounds, whole, whole[first:last].clone(), first, axis, axis, lasts=True)
        for first, last in zip([0, *cuts], [*cuts, len(whole)])
    ]


def test_the_worked_example() -> None:
    parts = _parts(torch.tensor([0.5, -2, 0.3, 1, 0.25, -4]), [3], [(0, 6)])
    assert [part.magnitudes().tolist() for part in parts] == [[2.0], [4.0]]
    for part in parts:
        part.quantize(torch.tensor([4.0]))
    codes = torch.cat([part.divided.run for part in parts]).view(torch.float8_e4m3fn)
    assert codes.float().tolist() == [56, -224, 32, 112, 28, -448]
    assert parts[0].units.tolist() == [pytest.approx(1 / 112)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_codes_of_runs_are_those_of_the_whole(dtype: torch.dtype) -> None:
    """Three weights, cut where a weight begins, inside one, and into a run of padding alone."""
    torch.manual_seed(0)
    shapes = (32, 48), (16, 16), (64, 32)
    weights = [(torch.randn(shape) * scale).to(dtype) for shape, scale in zip(shapes, (1.0, 1e-3, 30.0))]
    whole = torch.cat([*(weight.flatten() for weight in weights), torch.zeros(7, dtype=dtype)])
    bounds = [(0, 1536), (1536, 1792), (1792, 3840)]
    parts = _parts(whole, [700, 1536, 1800, 3841], bounds)
    magnitudes = torch.stack([part.magnitudes() for part in parts]).amax(0)
    for part in parts:
        part.quantize(magnitudes)
    codes = torch.cat([part.divided.run for part in parts]).view(torch.float8_e4m3fn)
    for weight, (first, last), unit in zip(weights, bounds, parts[3].units):
        want = quantize(weight, FORWARD)
        got = Quantized(codes[first:last].view(weight.shape), unit)
        assert torch.equal(got.rows.view(torch.uint8), want.rows.view(torch.uint8))
        assert torch.equal(got.columns.view(torch.uint8), want.columns.view(torch.uint8))
        assert got.columns.is_contiguous() and got.columns.dtype == FORWARD
        assert torch.equal(got.unit, want.unit)


def test_what_is_not_finite_stays_so() -> None:
    for bad in (torch.inf, torch.nan):
        (part,) = _parts(torch.tensor([1.0, bad, 2.0]), [], [(0, 3)])
        quantize_all([part])
        part.divided.whole.copy_(part.divided.run)
        assert part.of(0, torch.Size([3]))[0].isnan().any()


def _planned(parallel: dict[str, Any]) -> None:
    config = _config(Layout("planned", parallel), True)
    engine = make_engine(config)
    memory = MemoryModel(config, engine.mesh, Placement.of(config, engine.mesh), "blocked").with_plans({})
    train_steps(engine, 1)
    linear = 12_288 * 4
    buckets = engine.optimizer.buckets
    held = [x for bucket in buckets for x in (bucket.values, bucket.run)]
    held += [x for bucket in buckets if bucket.codes for x in (bucket.codes.divided.whole, bucket.codes.divided.run)]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in held}
    norms = 4 * 9 * 32  # vectors are whole in ZeRO-3, and 2 bytes each; the plan divides them
    assert sum(storages.values()) + (linear if parallel["zero"] < 3 else 0) == pytest.approx(memory.weights, abs=norms)


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_the_plan_counts_codes(zero: int, pool: RankPool) -> None:
    pool.run(2, _planned, {"dp": 2, "zero": zero})
