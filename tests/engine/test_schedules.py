"""Schedules of equal placement sum in the same order, so their bits agree; and a user's file runs as any other."""

from pathlib import Path

import pytest
import torch
from layouts import make_config, run_layout

from megascratch.dist.mesh import Axis, Mesh
from megascratch.dist.testing import run_ranks
from megascratch.engine.stages import make_stages
from megascratch.errors import LayoutError
from megascratch.pipeline import ScheduleError, configured_routes, configured_schedule, make_schedule


def _weights_and_losses(parallel: dict, world: int = 2, model: str = "llama"):
    ranks = run_ranks(world, run_layout, make_config(model, parallel), 3)
    return [[values for *_, values in trained.weights] for trained in ranks], ranks[0].reports


def _assert_equal_bits(first, second):
    assert first[1] == second[1]
    for ours, theirs in zip(first[0], second[0], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_schedules_of_one_stage_a_rank_agree_bit_for_bit():
    reference = _weights_and_losses({"pp": 2, "schedule": "1f1b"})
    for schedule in ("gpipe", "zb-h1", "zb-h2"):
        _assert_equal_bits(reference, _weights_and_losses({"pp": 2, "schedule": schedule}))
    _assert_equal_bits(reference, _weights_and_losses({"pp": 2, "schedule": "zb-h1", "recompute": "full"}))


def test_v_shaped_schedules_agree_bit_for_bit():
    reference = _weights_and_losses({"pp": 2, "vp": 2, "schedule": "zb-v"})
    for schedule in ("v-half", "v-min", "dualpipe-v"):
        _assert_equal_bits(reference, _weights_and_losses({"pp": 2, "vp": 2, "schedule": schedule}))


def test_a_file_that_holds_a_known_schedule_is_that_schedule(tmp_path: Path):
    file = tmp_path / "mine.txt"
    file.write_text(f"# ZB-H1\n{make_schedule('zb-h1', 2, 1, 8)}")
    written = _weights_and_losses({"pp": 2, "schedule_file": str(file)})
    _assert_equal_bits(_weights_and_losses({"pp": 2, "schedule": "zb-h1"}), written)


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
