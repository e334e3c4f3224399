"""Schedules of equal placement sum in the same order, so their bits agree; and a user's file runs as any other."""

from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import Trained, make_config, run_layout

from megascratch.dist.mesh import Axis, Mesh
from megascratch.dist.testing import run_ranks
from megascratch.engine.stages import make_stages
from megascratch.errors import LayoutError
from megascratch.pipeline import ScheduleError, configured_routes, configured_schedule, make_schedule


def _train_all(layouts: list[dict[str, Any]], model: str) -> list[Trained]:
    """On one rank: three steps under each layout."""
    return [run_layout(make_config(model, parallel), 3) for parallel in layouts]


def _assert_equal_bits(layouts: list[dict[str, Any]], model: str = "llama") -> None:
    """Every layout gives the losses, norms and weights of the first, on each of two ranks."""
    for first, *others in run_ranks(2, _train_all, layouts, model):
        for other in others:
            assert other.reports == first.reports
            for (name, *_, ours), (_, *_, theirs) in zip(other.weights, first.weights, strict=True):
                assert torch.equal(ours, theirs), name


def test_schedules_of_one_stage_a_rank_agree_bit_for_bit() -> None:
    names = ("1f1b", "gpipe", "zb-h1", "zb-h2")
    layouts: list[dict[str, Any]] = [{"pp": 2, "schedule": name} for name in names]
    _assert_equal_bits(layouts)


def test_recomputation_agrees_bit_for_bit_under_every_backward() -> None:
    """With dropout, whole and split backwards: what is computed again are the same numbers."""
    ways: list[dict[str, Any]] = [
        {},
        {"recompute": "full"},
        {"recompute": "selective", "recompute_modules": ["core_attn", "layernorm", "mlp_act"]},
        {"recompute": "block", "recompute_layers": 1, "offload_activations": True},
    ]
    layouts = [{"pp": 2, "schedule": schedule, **way} for schedule in ("1f1b", "zb-h1") for way in ways]
    _assert_equal_bits(layouts, "dropout")


def test_v_shaped_schedules_agree_bit_for_bit() -> None:
    names = ("zb-v", "v-half", "v-min", "dualpipe-v")
    _assert_equal_bits([{"pp": 2, "vp": 2, "schedule": name} for name in names])


def test_a_file_that_holds_a_known_schedule_is_that_schedule(tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    file.write_text(f"# ZB-H1\n{make_schedule('zb-h1', 2, 1, 8)}")
    _assert_equal_bits([{"pp": 2, "schedule": "zb-h1"}, {"pp": 2, "schedule_file": str(file)}])


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
