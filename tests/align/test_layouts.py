"""Layout is not physics in alignment either: loss, gradient norm, metrics and weights, to 1e-9 in float64."""

import functools
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from alignment import PACKED_WAYS, WAYS, WAYS_AND_PACKED, save_tokenizer, way_config, write_way
from layouts import Trained, local_weights, whole_weights

from megascratch.align.methods import METHODS
from megascratch.config import Config
from megascratch.dist.mesh import Mesh
from megascratch.dist.testing import RankPool
from megascratch.engine import Engine
from megascratch.engine.state import load_engine, save_engine

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tp": 2},
    "tp2-no-sp": {"tp": 2, "sequence_parallel": False},
    "pp2": {"pp": 2},
    "pp2-zb-h1-zero1": {"pp": 2, "dp": 2, "schedule": "zb-h1", "zero": 1},
    "pp2-vp2-zb-v": {"pp": 2, "vp": 2, "schedule": "zb-v"},
    "pp2-dualpipe": {"pp": 2, "schedule": "dualpipe"},
    "cp2": {"cp": 2},
    "cp2-ulysses-dp2-zero2": {"cp": 2, "cp_algorithm": "ulysses", "dp": 2, "zero": 2},
    "dp2-zero3": {"dp": 2, "zero": 3},
    "dp4-zero1": {"dp": 4, "zero": 1},
    "tp2-pp2": {"tp": 2, "pp": 2},
    "tp2-cp2-all-gather": {"tp": 2, "cp": 2, "cp_algorithm": "all_gather"},
    "pp2-cp2": {"pp": 2, "cp": 2},
    "tp2-dp2-zero3": {"tp": 2, "dp": 2, "zero": 3},
}
WITH_ADAPTERS = ("tp2", "tp2-no-sp", "pp2-zb-h1-zero1", "pp2-dualpipe", "tp2-dp2-zero3")
N_STEPS = 2


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("layouts")
    save_tokenizer(folder)
    for way in WAYS_AND_PACKED:
        write_way(way, folder)
    yield folder
    _one_rank.cache_clear()


def _config(data: Path, way: str, packing: bool, run: str, parallel: dict[str, Any], n_layers: int) -> Config:
    folder = data / f"{way}-{packing}-{run}"
    # Micro-batches as large as fill the pipeline: every one costs a round of collectives.
    micro_batch = 2 if parallel.get("pp") or parallel.get("dp") or not parallel else 4
    sections = {"parallel": parallel, "model": {"n_layers": n_layers}, "train": {"micro_batch": micro_batch}}
    return way_config(way, data / "tokenizer.json", data / f"{way}.jsonl", folder, packing, **sections)


def _train(config: Config, verb: str, n_steps: int = N_STEPS, saved: Path | None = None) -> Trained:
    """Train some steps as one rank of a layout; from a checkpoint if there is one, else leave one behind."""
    Path(config.log.dir).mkdir(parents=True, exist_ok=True)
    mesh = Mesh.of(config, torch.device("cpu"))
    begin = METHODS[verb].open(config, mesh)
    engine = Engine(config, mesh)
    consumed = load_engine(engine, saved) if saved is not None else 0
    task = begin(engine)
    reports = [engine.train_step(batch, task.objective) for batch in task.train.steps(consumed, n_steps, prefetch=0)]
    if saved is None and n_steps < N_STEPS:
        save_engine(engine, Path(config.log.dir), consumed + n_steps * config.train.global_batch)
    return Trained(reports, [], local_weights(engine))


def _train_all(configs: dict[tuple[str, bool], Config]) -> dict[tuple[str, bool], Trained]:
    return {(way, packing): _train(config, WAYS_AND_PACKED[way][0]) for (way, packing), config in configs.items()}


@functools.cache
def _one_rank(data: Path, way: str, packing: bool, n_layers: int) -> Trained:
    torch.set_num_threads(1)
    return _train(_config(data, way, packing, f"one-{n_layers}", {}, n_layers), WAYS_AND_PACKED[way][0])


def _assert_equal(ranks: list[Trained], reference: Trained, what: str) -> None:
    for trained in ranks:
        for got, want in zip(trained.reports, reference.reports[-len(trained.reports) :], strict=True):
            assert got.loss == pytest.approx(want.loss, rel=1e-9), what
            assert got.grad_norm == pytest.approx(want.grad_norm, rel=1e-9), what
            assert got.metrics == pytest.approx(want.metrics, rel=1e-9, abs=1e-12), what
    weights = whole_weights(ranks)
    for name, want in whole_weights([reference]).items():
        error = (weights[name] - want).norm() / want.norm().clamp_min(1e-30)
        assert error < 1e-9, f"{what}: {name} is off by {error:.1e}"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_way_computes_what_one_rank_computes(layout: str, data: Path, pool: RankPool) -> None:
    """Packed, and with a row for each answer."""
    parallel = LAYOUTS[layout]
    n_layers = 4 if parallel.get("vp") else 2
    ways = [way for way in WAYS if way != "lora" or layout in WITH_ADAPTERS]
    runs = list(itertools.product(ways, (True, False)))
    configs = {(way, packing): _config(data, way, packing, layout, parallel, n_layers) for way, packing in runs}
    ranks = pool.run(_world(parallel), _train_all, configs)
    for way, packing in runs:
        reference = _one_rank(data, way, packing, n_layers)
        _assert_equal([rank[way, packing] for rank in ranks], reference, f"{way}, {packing=}")


def test_what_is_compared_moves(data: Path) -> None:
    """A reference run that learned nothing would be equal to anything."""
    for way in WAYS:
        reports = _one_rank(data, way, True, 2).reports
        assert abs(reports[-1].loss - reports[0].loss) > 1e-6, way
        assert reports[0].grad_norm > 1e-3, way


# The way, and layouts: the last one divides experts.
WITH_PACKED_BASE = [
    *itertools.product(PACKED_WAYS, ("tp2", "pp2-zb-h1-zero1", "tp2-dp2-zero3", "cp2-ulysses-dp2-zero2")),
    ("experts", "tp2-dp2-ep2"),
]


@pytest.mark.parametrize(("way", "layout"), WITH_PACKED_BASE)
def test_adapters_beside_4_bits_compute_what_one_rank_computes(
    way: str, layout: str, data: Path, pool: RankPool
) -> None:
    parallel = {**LAYOUTS, "tp2-dp2-ep2": {"tp": 2, "dp": 2, "ep": 2}}[layout]
    packing = way != "experts"  # routers see padding, so that it must be the same everywhere
    config = _config(data, way, packing, layout, parallel, 2)
    ranks = pool.run(_world(parallel), _train, config, WAYS_AND_PACKED[way][0])
    reference = _one_rank(data, way, packing, 2)
    assert reference.reports[1].loss != reference.reports[0].loss and reference.reports[1].grad_norm > 1e-3
    _assert_equal(ranks, reference, way)


# Each way stops on one layout and goes on on another: all of both together, and no two ways on the same.
RESUMED = {
    "sft": ("pp2-zb-h1-zero1", "tp2-cp2-all-gather"),
    "reward": ("tp2-dp2-zero3", "pp2-vp2-zb-v"),
    "dpo": ("cp2-ulysses-dp2-zero2", "tp2-pp2"),
    "kto": ("pp2-cp2", "dp4-zero1"),
    "lora": ("tp2-no-sp", "pp2-dualpipe"),
    "qlora": ("pp2-zb-h1-zero1", "tp2-dp2-zero3"),
}


@pytest.mark.parametrize("way", RESUMED)
def test_a_run_goes_on_on_another_layout(way: str, data: Path, pool: RankPool) -> None:
    first, second = (LAYOUTS[name] for name in RESUMED[way])
    n_layers = 4 if second.get("vp") else 2
    before = _config(data, way, True, "resumed", first, n_layers)
    pool.run(_world(first), _train, before, WAYS_AND_PACKED[way][0], 1)
    after = _config(data, way, True, "resumed", second, n_layers)
    ranks = pool.run(_world(second), _train, after, WAYS_AND_PACKED[way][0], 1, Path(before.log.dir))
    _assert_equal(ranks, _one_rank(data, way, True, n_layers), way)


def _world(parallel: dict[str, Any]) -> int:
    return math.prod(parallel.get(axis, 1) for axis in ("tp", "pp", "cp", "dp"))
