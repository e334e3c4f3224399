"""What sums in the same order agrees bit for bit; the page of what combines is true; a user's file runs as any."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from bitwise import GROUPS, Group
from combinations import FEATURES, PAGE, goes_with, page
from layouts import Layout, Trained, make_config, run_layout, whole_weights
from matrix import matrix

from megascratch.config import Config
from megascratch.dist.mesh import Axis, Mesh, MeshSpec
from megascratch.dist.testing import RankPool
from megascratch.engine.stages import make_stages
from megascratch.errors import LayoutError
from megascratch.pipeline import ScheduleError, configured_routes, configured_schedule, make_schedule


def _train_all(configs: list[Config]) -> list[Trained]:
    """Five steps under each configuration."""
    return [run_layout(config, 5) for config in configs]


def _assert_equal_bits(pool: RankPool, model: str, layouts: list[dict[str, Any]], global_batch: int = 8) -> None:
    """Every layout gives the losses, norms and weights of the first."""
    configs = [make_config(model, parallel, global_batch=global_batch) for parallel in layouts]
    results: dict[int, list[Trained]] = {}  # by the place in the list, of all ranks
    for world in sorted({_world(config) for config in configs}):
        places = [i for i, config in enumerate(configs) if _world(config) == world]
        of_ranks = pool.run(world, _train_all, [configs[i] for i in places])
        results |= {place: [trained[i] for trained in of_ranks] for i, place in enumerate(places)}
    losses = [(report.loss, report.grad_norm) for report in results[0][0].reports]
    weights = whole_weights(results[0])
    for place, ranks in results.items():
        for trained in ranks:
            assert [(report.loss, report.grad_norm) for report in trained.reports] == losses, layouts[place]
        for name, ours in whole_weights(ranks).items():
            assert torch.equal(ours, weights[name]), f"{name} under {layouts[place]}"


def _world(config: Config) -> int:
    return MeshSpec.of(config.parallel).world_size


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: next(iter(group.layouts)))
def test_layouts_that_sum_in_the_same_order_agree_bit_for_bit(group: Group, pool: RankPool) -> None:
    _assert_equal_bits(pool, group.model, list(group.layouts.values()), group.global_batch)


def test_the_comparison_sees_that_dp_adds_in_another_order(pool: RankPool) -> None:
    with pytest.raises(AssertionError, match="'dp': 2"):
        _assert_equal_bits(pool, "llama", [{}, {"dp": 2}])


def test_the_page_on_layouts_is_current_and_its_ticks_are_in_the_matrix() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run python tests/combinations.py"
    tried = set().union(*(_features_of(layout) for layout in matrix()[0]))
    for pair in itertools.combinations(FEATURES, 2):
        if goes_with(*pair):
            assert pair in tried, f"{pair} combine, and no layout of the matrix has both"


def _features_of(layout: Layout) -> set[tuple[str, str]]:
    """Return the pairs of features that a layout has."""
    values = {**layout.parallel, "model": layout.model, "micro_batch": layout.micro_batch, "packed": layout.packed}
    has = [
        name
        for name, wants in FEATURES.items()
        if all(
            values.get(key, 1) >= value if key in ("tp", "pp", "cp", "dp", "ep") else values.get(key) == value
            for key, value in wants.items()
        )
    ]
    return set(itertools.combinations(has, 2))


def test_a_file_that_holds_a_known_schedule_is_that_schedule(tmp_path: Path, pool: RankPool) -> None:
    file = tmp_path / "mine.txt"
    file.write_text(f"# ZB-H1\n{make_schedule('zb-h1', 2, 1, 8)}")
    _assert_equal_bits(pool, "llama", [{"pp": 2, "schedule": "zb-h1"}, {"pp": 2, "schedule_file": str(file)}])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (str(make_schedule("1f1b", 2, 1, 6)), "6 microbatches  must be 8: global_batch / .* write the file for this"),
        (
            str(make_schedule("1f1b", 3, 1, 8)),
            r"3 lines +must be parallel.pp = 2(?s:.*)3 stages +must be parallel.pp 2",
        ),
        ("0F0 0B0\n1F0 1X0\n", "action '1X0' +must be a stage"),
        (str(make_schedule("1f1b", 2, 1, 8)).replace(" 1B3", ""), "rank 0: 0B3  waits for ever for 0RB3"),
        (
            str(make_schedule("1f1b", 2, 1, 8)).replace("1F7 1B7", "1F7 1B7 1B7"),
            "1B7 +must stand on rank 1 exactly once",
        ),
    ],
)
def test_a_wrong_file_is_refused_before_a_step(tmp_path: Path, text: str, reason: str):
    file = tmp_path / "mine.txt"
    file.write_text(text)
    config = make_config("llama", {"pp": 2, "schedule_file": str(file)})
    with pytest.raises(ScheduleError, match=reason):
        configured_schedule(config.parallel, 8)


def test_a_missing_file_is_refused():
    with pytest.raises(ScheduleError, match=r"nowhere.txt +cannot be read as text"):
        configured_routes(make_config("llama", {"pp": 2, "schedule_file": "nowhere.txt"}).parallel)


def test_a_tied_embedding_needs_its_ends_joined():
    mesh = Mesh.serial()
    mesh = type(mesh)(**{**mesh.__dict__, "pp": Axis("pp", 3, 0, (0, 1, 2))})
    with pytest.raises(LayoutError, match=r"tie_embeddings = true +needs the first and last stage on ranks 0 and 2"):
        make_stages(make_config("tied", {"pp": 3}), mesh, None, ((1, 0, 2),), "softmax")  # type: ignore[arg-type]
