"""Weights quantised once a step: counted, and bit for bit what quantising at every use gives."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import transformer_engine_stand_in as stand_in
from layouts import Layout, local_weights, make_batches, make_engine, train_steps
from torch import Tensor

from megascratch.config import Config, config_from_dict
from megascratch.dist.layout import spec_of
from megascratch.dist.mesh import Mesh
from megascratch.dist.testing import RankPool
from megascratch.engine import Engine, next_token
from megascratch.engine.memory import MemoryModel
from megascratch.engine.state import load_engine, save_engine
from megascratch.nn import Placement
from megascratch.nn.fp8 import Recipe, Role, Tensorwise

Counts = dict[Role, Counter[str]]  # of every role, how often a matrix of each layer was quantised


def _config(layout: Layout, recipe: str = "tensorwise", cache: bool = True) -> Config:
    """Return a layout's run in fp8, with sides that its products take."""
    raw = layout.config(dtype="bf16").model_dump(exclude_none=True)
    train = {**raw["train"], "dtype": "fp8", "fp8_recipe": recipe, "fp8_weight_cache": cache}
    return config_from_dict({**raw, "model": {**raw["model"], "ffn_hidden": 64}, "train": train})


@contextmanager
def _counting(engine: Engine) -> Iterator[Counts]:
    counts: Counts = {"input": Counter(), "weight": Counter(), "gradient": Counter()}
    kind = type(engine.fp8)
    assert issubclass(kind, Recipe)
    quantize = kind.quantize

    def counted(self: Any, x: Tensor, role: Role, weight: Tensor) -> Any:
        counts[role][spec_of(weight).name] += 1
        return quantize(self, x, role, weight)

    with patch.object(kind, "quantize", counted):
        yield counts


def _run(config: Config) -> tuple[list[Any], list[Counts]]:
    """Evaluate and train in turn; return all that came of it, and what each of the two quantised, twice over."""
    engine = make_engine(config)
    found: list[Any] = []
    counted = []
    batches = make_batches(config, engine.mesh)
    for step in range(2):
        with _counting(engine) as counts:
            found.append(engine.evaluate(batches.at(0), next_token).loss)
        counted.append(counts)
        with _counting(engine) as counts:
            found.append(engine.train_step(batches.at(8 * step), next_token))
        counted.append(counts)
        found += [bucket.grads.clone() for bucket in engine.optimizer.buckets]
    found += [values for *_, values in local_weights(engine)]
    assert engine.fp8 is not None
    return found + [history.clone() for _, history in engine.fp8.state()], counted


def _equal(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b


def _compare(layout: Layout, recipe: str) -> None:
    """Run with weights kept and with weights quantised at every use, on this rank."""
    torch.set_num_threads(1)
    with stand_in.transformer_engine():
        kept, once = _run(_config(layout, recipe))
        anew, often = _run(_config(layout, recipe, cache=False))
    assert len(kept) == len(anew) and all(map(_equal, kept, anew))
    assert len({found for found in kept if isinstance(found, float)}) == 2, "weights change, and evaluation sees it"
    parallel = layout.parallel
    n = 8 // (layout.micro_batch * parallel.get("dp", 1) * (2 if parallel.get("schedule") == "dualpipe" else 1))
    forwards = 2 if parallel.get("recompute") == "full" else 1
    # ZeRO-3 has a weight here for a forward, or for a backward and what that computes again.
    evaluating, training = (n, 2 * n) if parallel.get("zero") == 3 else (1, 1)
    _require_of_weights(once, evaluating, training)
    _require_of_weights(often, n, (forwards + 1) * n)
    # A column layer's input is gathered again for the gradient of its weight.
    gathers = parallel.get("tp", 1) > 1 and parallel.get("sequence_parallel", True)
    for counts in (*once[1::2], *often[1::2]):
        names = set(counts["weight"])
        columns = {name for name in names if "qkv" in name or "gate_up" in name}
        assert counts["gradient"] == Counter(dict.fromkeys(names, n))
        assert counts["input"] == Counter({name: n * (forwards + (gathers and name in columns)) for name in names})


def _require_of_weights(counts: list[Counts], evaluating: int, training: int) -> None:
    """Require that every weight was quantised so often in each evaluation and step."""
    names = set(counts[0]["weight"])
    assert len(names) % 4 == 0
    for evaluated, trained in zip(counts[::2], counts[1::2]):
        assert evaluated["weight"] == Counter(dict.fromkeys(names, evaluating))
        assert trained["weight"] == Counter(dict.fromkeys(names, training))


_RUNS = [
    ("tensorwise", Layout("8-micro-batches", {})),
    ("tensorwise", Layout("2-micro-batches", {}, micro_batch=4)),
    ("delayed", Layout("1-micro-batch", {}, micro_batch=8)),
    ("mxfp8", Layout("recompute", {"recompute": "full"}, micro_batch=2)),
    ("delayed", Layout("selective", {"recompute": "selective"}, micro_batch=2)),
    ("tensorwise", Layout("pp2-dp2-zero1-1f1b", {"pp": 2, "dp": 2, "zero": 1})),
    ("tensorwise", Layout("tp2-pp2-zb", {"tp": 2, "pp": 2, "schedule": "zb-h1"})),
    ("delayed", Layout("tp2-pp2-vp2", {"tp": 2, "pp": 2, "vp": 2})),
    ("delayed", Layout("pp2-dualpipe", {"pp": 2, "schedule": "dualpipe"})),
    ("delayed", Layout("tp2-dp2-nosp-full", {"tp": 2, "dp": 2, "sequence_parallel": False, "recompute": "full"})),
    ("tensorwise", Layout("cp2-dp2-zero2", {"cp": 2, "dp": 2, "zero": 2}, micro_batch=2)),
    ("tensorwise", Layout("dp2-zero3-full", {"dp": 2, "zero": 3, "recompute": "full"})),
    ("delayed", Layout("pp2-dp2-zero3-zb", {"pp": 2, "dp": 2, "zero": 3, "schedule": "zb-h1"})),
]


@pytest.mark.parametrize(("recipe", "layout"), _RUNS, ids=lambda given: getattr(given, "name", given))
def test_once_a_step_is_at_every_use_to_the_bit(recipe: str, layout: Layout, pool: RankPool) -> None:
    pool.run(layout.world, _compare, layout, recipe)


def test_what_was_made_of_weights_does_not_outlive_them() -> None:
    recipe, weight = Tensorwise(), torch.nn.Parameter(torch.randn(16, 16))
    units: list[float] = []

    def use() -> None:
        units.append(recipe.quantized_weight(weight).unit.item())

    for _ in range(2):
        with recipe.weights_stay():
            use()
            weight.data.mul_(2)  # nobody may
            use()
    assert units == pytest.approx([units[0] * factor for factor in (1, 1, 2, 2)])
    use()
    weight.data.mul_(2)
    use()
    assert units[4:] == pytest.approx([units[0] * factor for factor in (4, 8)]), "at every use"
    with suppress(ZeroDivisionError), recipe.weights_stay():
        use()
        units.append(1 / 0)
    weight.data.mul_(2)
    with recipe.weights_stay():
        use()
        weight.data.mul_(2)
        recipe.release([torch.nn.Parameter(torch.empty(1)), weight])
        use()
    recipe.release([weight])
    assert units[6:] == pytest.approx([units[0] * factor for factor in (8, 16, 32)])


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed"])
def test_a_resumed_run_in_an_engine_that_has_had_other_weights(recipe: str, tmp_path: Path) -> None:
    layout = Layout("alone", {}, micro_batch=2)
    with stand_in.transformer_engine():
        engine = make_engine(_config(layout, recipe))
        train_steps(engine, 2)
        path = save_engine(engine, tmp_path, 16)
        went_on = train_steps(engine, 2, consumed_samples=16)
        for cache in (True, False):
            other = make_engine(_config(layout, recipe, cache))
            train_steps(other, 3)
            other.evaluate(make_batches(other.config, other.mesh).at(0), next_token)
            assert load_engine(other, path) == 16
            resumed = train_steps(other, 2, consumed_samples=16)
            assert resumed.reports == went_on.reports
            assert all(torch.equal(a[-1], b[-1]) for a, b in zip(resumed.weights, went_on.weights, strict=True))


def _kept_bytes(layout: Layout) -> None:
    config = _config(layout)
    engine = make_engine(config)
    memory = MemoryModel(config, engine.mesh, Placement.of(config, engine.mesh), "blocked")
    quantized_weight, most = Recipe.quantized_weight, 0

    def counted(self: Recipe, weight: Tensor) -> Any:
        nonlocal most
        made = quantized_weight(self, weight)
        assert self._of_weights is not None
        most = max(most, sum(kept.rows.nbytes + kept.columns.nbytes for kept in self._of_weights.values()))
        return made

    with patch.object(Recipe, "quantized_weight", counted):
        train_steps(engine, 1)
    assert most > 0
    assert engine.fp8 is not None and engine.fp8._of_weights is None
    without = MemoryModel(_config(layout, cache=False), engine.mesh, memory.placement, "blocked")
    assert memory.with_plans({}).total - without.with_plans({}).total == most


@pytest.mark.parametrize(
    "layout",
    [
        Layout("tp2-pp2-dualpipe", {"tp": 2, "pp": 2, "schedule": "dualpipe"}),
        Layout("tp2-vp2", {"tp": 2, "pp": 2, "vp": 2}),
        Layout("dp2-zero2", {"dp": 2, "zero": 2}),
        Layout("dp2-zero3", {"dp": 2, "zero": 3, "recompute": "full"}),
        Layout("dp2-zero3-ahead", {"dp": 2, "zero": 3}, "mtp"),
    ],
    ids=lambda layout: layout.name,
)
def test_the_plan_counts_what_is_kept(layout: Layout, pool: RankPool) -> None:
    pool.run(layout.world, _kept_bytes, layout)


def test_the_plan_by_hand() -> None:
    """A layer of hidden 32: 32 × 128 of qkv, 64 × 32 behind the heads, 3 × 32 × 64 of the feed-forward: 12,288."""
    for recipe, each in {"tensorwise": 2.0, "delayed": 2.0, "mxfp8": 2.0625}.items():
        layout = Layout("alone", {}, micro_batch=2)
        config = _config(layout, recipe)
        memory = MemoryModel(config, Mesh.serial(), Placement.of(config, Mesh.serial()), "blocked")
        without = MemoryModel(_config(layout, recipe, cache=False), Mesh.serial(), memory.placement, "blocked")
        assert memory.with_plans({}).weights - without.with_plans({}).weights == 4 * 12_288 * each
