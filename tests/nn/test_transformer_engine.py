"""transformer-engine's recipes behind our linear layers, by a stand-in with its recorded signatures.

No GPU has run them. Rounding of the stand-in is the recipe's own, so products are held against torch's of the rounded
matrices; without the rounding, whole runs on every kind of layout must be those of one rank in float64.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import transformer_engine_stand_in as stand_in
from layouts import Layout, Trained, make_batches, make_config, make_engine, train_steps, whole_weights
from recorded import RECORDED
from torch import Tensor

from megascratch.config import Config, config_from_dict
from megascratch.dist.mesh import Axis, Mesh
from megascratch.dist.testing import RankPool
from megascratch.engine import Engine, next_token
from megascratch.engine.state import load_engine, save_engine
from megascratch.errors import ConfigError, MissingDependency
from megascratch.nn import DTYPES, WeightGradients
from megascratch.nn.fp8 import BACKWARD, FORWARD, Recipe
from megascratch.nn.linear import column_linear
from megascratch.nn.placement import Placement
from megascratch.nn.transformer_engine import HISTORY_STEPS, DelayedScaling, recipe_of

RELEASES = [release for release, modules in RECORDED["transformer_engine"].items() if stand_in.GEMM in modules]
RECIPES = ("delayed", "blockwise", "mxfp8")


def _weight(*shape: int) -> torch.nn.Parameter:
    placement = Placement(Axis("tp"), False, torch.float32, torch.device("cpu"))
    weight = placement.parameter(*shape)
    weight.data.copy_(torch.randn(shape) / 7)
    return weight


def _expected(name: str, x: Tensor, role: str) -> tuple[Tensor, Tensor]:
    """What a matrix is rounded to, as it is multiplied along rows, and along columns; in its first step."""
    match name:
        case "delayed":
            dtype = BACKWARD if role == "gradient" else FORWARD
            made = stand_in.rounded(x, torch.finfo(dtype).max / x.abs().max(), dtype)
            return made, made
        case "mxfp8":
            return stand_in.in_blocks(x, 1, 32, FORWARD), stand_in.in_blocks(x, 32, 1, FORWARD)
    n = 128 if role == "weight" else 1
    return stand_in.in_blocks(x, n, 128, FORWARD), stand_in.in_blocks(x, 128, n, FORWARD)


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("name", RECIPES)
def test_three_products_of_every_recipe_and_release(name: str, release: str) -> None:
    torch.manual_seed(0)
    x, grad = torch.randn(64, 2, 256).requires_grad_(), torch.randn(64, 2, 128) * torch.logspace(-4, 0, 128)
    weight = _weight(128, 256)
    with stand_in.transformer_engine(release):
        recipe = recipe_of(name, Mesh.serial())
        recipe.attach([weight])
        y = column_linear(x, weight, Axis("tp"), False, fp8=recipe)
        y.backward(grad)
    flat, gflat = x.detach().flatten(0, 1), grad.flatten(0, 1)
    (xr, xc), (wr, wc), (gr, gc) = (
        _expected(name, m, role) for m, role in ((flat, "input"), (weight.detach(), "weight"), (gflat, "gradient"))
    )
    for got, want in ((y, xr @ wr.t()), (x.grad, gr @ wc), (weight.grad, gc.t() @ xc)):
        assert got is not None
        torch.testing.assert_close(got.detach().view(want.shape), want)
    plain = flat @ weight.detach().t()
    assert 0.01 < (y.detach().view(plain.shape) - plain).norm() / plain.norm() < 0.08


@pytest.mark.parametrize("name", RECIPES)
def test_a_weight_gradient_is_added_to_the_main_one_at_once_or_put_off(name: str) -> None:
    torch.manual_seed(0)
    weight, later = _weight(128, 128), WeightGradients()
    x, grad, total = torch.randn(128, 1, 128), torch.randn(128, 1, 128), torch.ones(128, 128)
    with stand_in.transformer_engine():
        recipe = recipe_of(name, Mesh.serial())
        recipe.attach([weight])
        column_linear(x, weight, Axis("tp"), False, later, fp8=recipe).backward(grad)
        alone, weight.grad = weight.grad, None
        weight.main_grad = lambda: total  # type: ignore[attr-defined]
        with later.collect() as owed:
            column_linear(x, weight, Axis("tp"), False, later, fp8=recipe).backward(grad)
        assert weight.grad is None and (total == 1).all()
        for compute in owed:
            compute()
    assert alone is not None and weight.grad is None
    torch.testing.assert_close(total, alone + 1)


def test_a_history_by_hand() -> None:
    weight = _weight(16, 16)
    with stand_in.transformer_engine():
        recipe = recipe_of("delayed", Mesh.serial())
    assert isinstance(recipe, DelayedScaling)
    recipe.attach([weight])
    largest, scales = (2.0, 4.0, 1.0), []
    for i in range(HISTORY_STEPS + 3):
        recipe.begin_step()
        for part in (0.25, 1.0):  # micro-batches
            recipe.quantize(torch.full((16, 16), part * largest[min(i, 2)]), "input", weight)
        scales.append(recipe.scales[0, 0].item())
        recipe.end_step()
    assert scales[:5] == [224, 224, 112, 112, 112]
    assert scales[-3:] == [112, 112, 448], "step 2 falls out of the history"
    recipe.quantize(torch.full((16, 16), 9.0), "input", weight)  # evaluation counts for nothing
    recipe.begin_step()
    recipe.quantize(torch.full((16, 16), torch.inf), "input", weight)
    recipe.end_step()
    assert recipe.scales[0, 0] == 448 and recipe.history[0, 0, 0] == 0
    assert recipe.scales[0, 1:].tolist() == [1, 1], "nothing was seen"


def _exact_run(name: str, layout: Layout, save: Path | None = None) -> tuple[Trained, dict[str, Tensor]]:
    """Train in float64 with linear layers that go through a recipe which does not round; also what it remembers."""
    torch.set_num_threads(1)
    with stand_in.transformer_engine(exact=True), patch.dict(DTYPES, fp8=torch.float64):
        engine = make_engine(_exact(name, layout))
        trained = train_steps(engine, 3)
        assert engine.fp8 is not None
        if save is not None:
            save_engine(engine, save, 24)
        return trained, {spec.name: history.clone() for spec, history in engine.fp8.state()}


_PARITY = [
    ("delayed", Layout("tp2-pp2-zb", {"tp": 2, "pp": 2, "schedule": "zb-h1"})),
    ("delayed", Layout("tp2-dp2-nosp-full", {"tp": 2, "dp": 2, "sequence_parallel": False, "recompute": "full"})),
    ("delayed", Layout("pp2-dp2-dualpipe", {"pp": 2, "dp": 2, "schedule": "dualpipe"}, "qwen")),
    ("delayed", Layout("cp2-dp2-zero3", {"cp": 2, "dp": 2, "zero": 3})),
    ("mxfp8", Layout("tp2-pp2-vp2", {"tp": 2, "pp": 2, "vp": 2})),
]


@pytest.mark.parametrize(("name", "layout"), _PARITY, ids=lambda given: getattr(given, "name", given))
def test_layouts_agree_to_1e_9_and_on_every_scale(name: str, layout: Layout, pool: RankPool) -> None:
    plain = train_steps(make_engine(make_config(layout.model)), 3)
    alone, known = _exact_run(name, Layout("alone", {}, layout.model))
    assert [r.loss for r in alone.reports] == pytest.approx([r.loss for r in plain.reports], rel=1e-12)
    ranks = pool.run(layout.world, _exact_run, name, layout)
    whole = whole_weights([trained for trained, _ in ranks])
    for trained, history in ranks:
        assert [r.loss for r in trained.reports] == pytest.approx([r.loss for r in alone.reports], rel=1e-9)
        for weight, entries in history.items():
            torch.testing.assert_close(entries, known[weight], rtol=1e-5, atol=0)  # kept in float32
    for weight, want in whole_weights([alone]).items():
        torch.testing.assert_close(whole[weight], want, rtol=1e-9, atol=1e-11)
    assert (name == "delayed") == bool(known)
    assert set().union(*(history for _, history in ranks)) == set(known)
    assert all((entries[:, :3] > 0).all() and not entries[:, 3:].any() for entries in known.values())


@pytest.mark.parametrize("schedule", ["1f1b", "dualpipe"])
def test_a_history_of_four_ranks_is_read_by_one(schedule: str, tmp_path: Path, pool: RankPool) -> None:
    layout = Layout("tp2-pp2", {"tp": 2, "pp": 2, "schedule": schedule})
    ranks = pool.run(4, _exact_run, "delayed", layout, tmp_path)
    saved = {name: entries for _, history in ranks for name, entries in history.items()}
    with stand_in.transformer_engine(exact=True), patch.dict(DTYPES, fp8=torch.float64):
        engine = make_engine(_exact("delayed", Layout("alone", {})))
        load_engine(engine, tmp_path)
    assert engine.fp8 is not None
    found = {spec.name: entries for spec, entries in engine.fp8.state()}
    assert found.keys() == saved.keys()
    assert all(torch.equal(entries, saved[name]) for name, entries in found.items())


def _config(dtype: str, recipe: str = "tensorwise") -> Config:
    raw = make_config("llama", micro_batch=2).model_dump(exclude_none=True)
    train = {**raw["train"], "dtype": dtype, "fp8_recipe": recipe}
    return config_from_dict({**raw, "model": {**raw["model"], "ffn_hidden": 64}, "train": train})


def _exact(name: str, layout: Layout) -> Config:
    config = make_config(layout.model, layout.parallel)
    train = config.train.model_copy(update={"dtype": "fp8", "fp8_recipe": name})  # unchecked: any side will do here
    return config.model_copy(update={"train": train})


def test_training_is_that_in_bf16_but_for_rounding() -> None:
    bf16 = [report.loss for report in train_steps(make_engine(_config("bf16")), 6).reports]
    for recipe in ("delayed", "mxfp8"):
        with stand_in.transformer_engine():
            losses = [report.loss for report in train_steps(make_engine(_config("fp8", recipe)), 6).reports]
        assert losses == pytest.approx(bf16, rel=0.02)
        assert losses != bf16


def test_a_history_is_in_the_checkpoint_and_bf16_has_none(tmp_path: Path) -> None:
    with stand_in.transformer_engine():
        engine = make_engine(_config("fp8", "delayed"))
        train_steps(engine, 3)
        path = save_engine(engine, tmp_path / "fp8", 24)
        again, other = make_engine(_config("fp8", "delayed")), make_engine(_config("fp8", "tensorwise"))
        assert load_engine(again, path) == load_engine(other, path) == 24
        batches = make_batches(engine.config, engine.mesh).at(24)
        assert engine.train_step(batches, next_token) == again.train_step(batches, next_token)
        bf16 = save_engine(other, tmp_path / "bf16", 24)
        begun = make_engine(_config("fp8", "delayed"))
        load_engine(begun, bf16)
        assert begun.fp8 is not None and not any(history.any() for _, history in begun.fp8.state())
        begun.train_step(batches, next_token)


def _without(modules: dict[str, Any]) -> None:
    del modules[stand_in.PYTORCH].MXFP8Quantizer


@pytest.mark.parametrize(
    ("arrange", "options", "error", "message"),
    [
        (
            _without,
            {},
            MissingDependency,
            r"fp8_recipe = mxfp8 +needs .* 2\.10 or newer; .* no MXFP8Quantizer +install",
        ),
        (
            None,
            {"refused": "Device too old."},
            ConfigError,
            r"recipe = mxfp8 +is not for this device: Device too old\.",
        ),
    ],
)
def test_what_is_missing_is_said_before_training(
    arrange: Callable[[Any], None] | None, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with stand_in.transformer_engine(**options) as modules:
        if arrange is not None:
            arrange(modules)
        with pytest.raises(error, match=message):
            make_engine(_config("fp8", "mxfp8"))


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    with pytest.raises(MissingDependency, match=r"recipe = delayed +needs transformer-engine, which does not load"):
        Engine(_config("fp8", "delayed"), Mesh.serial())


def test_tensorwise_needs_no_library() -> None:
    assert isinstance(recipe_of("tensorwise", Mesh.serial()), Recipe)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that this torch can use")
@pytest.mark.parametrize("name", RECIPES)
def test_the_library_itself_on_a_gpu(name: str) -> None:
    mesh = Mesh.serial(torch.device("cuda"))
    try:
        recipe = recipe_of(name, mesh)
    except (MissingDependency, ConfigError) as error:
        pytest.skip(str(error))
    torch.manual_seed(0)
    weight = torch.nn.Parameter(_weight(256, 512).data.to("cuda", torch.bfloat16))
    weight.spec = _weight(256, 512).spec  # type: ignore[attr-defined]
    x = torch.randn(128, 1, 512, device="cuda", dtype=torch.bfloat16).requires_grad_()
    grad, total = torch.randn(128, 1, 256, device="cuda", dtype=torch.bfloat16), torch.zeros(256, 512, device="cuda")
    recipe.attach([weight])
    weight.main_grad = lambda: total  # type: ignore[attr-defined]
    for _ in range(2):
        x.grad = None
        total.zero_()
        recipe.begin_step()
        y = column_linear(x, weight, Axis("tp"), False, fp8=recipe)
        y.backward(grad)
        recipe.end_step()
        flat, gflat = x.detach().flatten(0, 1).float(), grad.flatten(0, 1).float()
        wide = weight.detach().float()
        for got, want in ((y, flat @ wide.t()), (x.grad, gflat @ wide), (total, gflat.t() @ flat)):
            assert got is not None
            error = (got.detach().float().view(want.shape) - want).norm() / want.norm()
            assert 0.005 < error < 0.08
