"""A checkpoint sent from rank to rank is the same there, takes the place of older ones, and failures hold nobody up."""

import importlib
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks_and_models import logical_tensors, tiny_config, write_checkpoint

from megascratch.checkpoint import find, receive_directory, send_directory
from megascratch.checkpoint.retention import complete_steps
from megascratch.dist.mesh import Mesh, MeshSpec
from megascratch.dist.testing import distributed
from megascratch.errors import CheckpointError


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


@distributed(world=2)
def test_copies_arrive_whole_and_older_ones_are_recycled(tmp_path: Path) -> None:
    importlib.import_module("megascratch.checkpoint.transfer")._PART_BYTES = 1000  # several parts a file
    world = Mesh.create(MeshSpec(dp=2), torch.device("cpu")).world
    here, there = tmp_path / "here", tmp_path / "there"
    config = tiny_config()
    for step in (10, 20, 30):
        if world.rank == 0:
            values = {name: value + step for name, value in logical_tensors(config).items()}
            path = write_checkpoint(here, config, values, step)
            send_directory(path, world, 1)
        else:
            receive_directory(there, world, 0, keep=1)
        dist.barrier()
        assert contents(find(there)) == contents(find(here))
    assert [path.name for path in complete_steps(there)] == ["step_00000030"]
    assert (there / "spare.tmp").is_dir(), "its space is for the next one"


@distributed(world=2)
def test_what_cannot_be_sent_or_written_does_not_stop_the_other(tmp_path: Path) -> None:
    world = Mesh.create(MeshSpec(dp=2), torch.device("cpu")).world
    config = tiny_config()
    if world.rank == 0:
        path = write_checkpoint(tmp_path / "here", config, logical_tensors(config))
        send_directory(path, world, 1)  # where there is no room
        file = path / "rank_00000.safetensors"
        file.rename(tmp_path / "moved")
        file.symlink_to(tmp_path / "moved")
        with pytest.raises(CheckpointError, match=r"rank_00000\.safetensors +cannot be opened"):
            send_directory(path, world, 1)
        send_directory(None, world, 1)
    else:
        (tmp_path / "file").touch()
        with pytest.raises(CheckpointError, match=r"file/step_00000010 +cannot be written: Not a directory"):
            receive_directory(tmp_path / "file", world, 0, keep=1)
        for _ in range(2):
            receive_directory(tmp_path / "there", world, 0, keep=1)
        assert not (tmp_path / "there").exists()
