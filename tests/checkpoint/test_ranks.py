"""Saving on one layout and loading on another, with real ranks."""

import importlib
from pathlib import Path

import pytest
import torch
from ranks_and_models import logical_tensors, rank_shards, tiny_config

from megascratch.checkpoint import load, read_state, save
from megascratch.dist.mesh import Mesh, MeshSpec
from megascratch.dist.testing import distributed
from megascratch.errors import CheckpointError

LAYOUTS = [MeshSpec(pp=2, tp=2), MeshSpec(pp=2, dp=2), MeshSpec(dp=2, tp=2), MeshSpec(dp=4)]


def place(mesh: Mesh) -> tuple[dict[str, int], dict[str, int]]:
    return dict(mesh.spec.sizes), dict(mesh.coords)


@distributed(world=4)
def test_every_layout_loads_what_every_layout_saved(tmp_path: Path) -> None:
    """Weights and the ZeRO runs of three optimizer tensors each, bit for bit, for all 16 pairs of layouts."""
    config = tiny_config()
    values = logical_tensors(config)
    meshes = [Mesh.create(spec, torch.device("cpu")) for spec in LAYOUTS]
    for step, saved in enumerate(meshes):
        shards = rank_shards(config, values, *place(saved))
        path = save(tmp_path, step, shards, {"rank": saved.rank}, saved.world, keep=1)
        assert read_state(path) == {"rank": 0, "step": step}
        assert [p.name for p in tmp_path.glob("step_*")] == [path.name]
        for loaded in meshes:
            wanted = rank_shards(config, values, *place(loaded))
            got = rank_shards(config, values, *place(loaded), fill=False)
            load(tmp_path, got)
            for a, b in zip(got, wanted):
                assert torch.equal(a.tensor.nan_to_num(-1), b.tensor.nan_to_num(-1)), (a.name, saved.spec, loaded.spec)


@distributed(world=4, timeout_s=60)
def test_a_rank_that_cannot_write_fails_on_every_rank(tmp_path: Path) -> None:
    config = tiny_config()
    values = logical_tensors(config, optimizer=False)
    mesh = Mesh.create(MeshSpec(tp=2, pp=2), torch.device("cpu"))
    shards = rank_shards(config, values, *place(mesh))
    save(tmp_path, 1, shards, {}, mesh.world)
    blocker = tmp_path / "step_00000002.tmp" / "rank_00002.safetensors"
    if mesh.rank == 2:

        def full(path: Path, *_: object, **__: object) -> None:
            raise OSError(28, "No space left on device", str(path))

        monkeypatch = pytest.MonkeyPatch()  # this process ends with the test
        monkeypatch.setattr(importlib.import_module("megascratch.checkpoint.save"), "write_pieces", full)
    with pytest.raises(CheckpointError, match=f"rank 2: {blocker} .*No space left on device"):
        save(tmp_path, 2, shards, {}, mesh.world)
    assert (tmp_path / "latest").read_text() == "step_00000001\n"
    load(tmp_path, shards)
