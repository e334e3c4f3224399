"""Saving beside training, shared between replicas, and behind URLs."""

import importlib
import itertools
import math
import random
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from command_line import exit_code
from ranks_and_models import WORLD, logical_tensors, rank_shards, tiny_config, write_checkpoint
from rich.console import Console

from megascratch.checkpoint import Saving, Shard, Staging, describe, find, load, place, prune, read_state, save, verify
from megascratch.checkpoint.format import check_tiling, whole
from megascratch.checkpoint.retention import complete_steps
from megascratch.checkpoint.save import shared_pieces
from megascratch.dist.layout import Extent, lengths
from megascratch.errors import CheckpointError, ConfigError

save_module = importlib.import_module("megascratch.checkpoint.save")


def one(value: torch.Tensor, name: str = "w", replica: int = 0, replicas: int = 1) -> Shard:
    box = whole(value.shape)
    return Shard(name, tuple(value.shape), value, [Extent(box, box)], True, replica, replicas)


def loaded(path: Path, like: torch.Tensor) -> torch.Tensor:
    shard = one(torch.zeros_like(like))
    load(path, [shard])
    return shard.tensor


def test_replicas_write_each_tensor_once_and_as_much_as_each_other() -> None:
    draw = random.Random(3)
    for _ in range(200):
        shapes = [tuple(draw.randint(1, 9) for _ in range(draw.randint(0, 3))) for _ in range(draw.randint(1, 6))]
        replicas, dtype = draw.randint(1, 5), draw.choice([torch.float32, torch.bfloat16])
        values = [torch.randn(shape).to(dtype) for shape in shapes]
        written = [
            shared_pieces([one(value, f"t{i}", replica, replicas) for i, value in enumerate(values)])
            for replica in range(replicas)
        ]
        for i, value in enumerate(values):
            pieces = [piece for own in written for piece in own if piece.name == f"t{i}"]
            check_tiling(f"t{i}", value.shape, [piece.box for piece in pieces], Path())
            for piece in pieces:
                assert torch.equal(piece.value(), value[piece.box])
                assert piece.value().shape == lengths(piece.box)
        sizes = [sum(piece.bytes for piece in own) for own in written]
        row = max(math.prod(shape[1:]) for shape in shapes) * dtype.itemsize
        assert max(sizes) - min(sizes) <= 2 * row


def test_a_copy_is_written_while_the_original_changes(tmp_path: Path) -> None:
    value, staging = torch.arange(1000.0), Staging()
    saving = Saving(tmp_path, 1, [one(value)], {"consumed_samples": 8}, WORLD, staging=staging)
    value.zero_()
    saving.start()
    saving.publish(clean=partial(prune, tmp_path, 0))
    assert torch.equal(loaded(tmp_path, value), torch.arange(1000.0))
    assert staging.bytes <= 1.1 * 4000
    Saving(tmp_path, 2, [one(value)], {}, WORLD, staging=staging).write()
    assert staging.bytes <= 1.1 * 4000, "the second copy takes the place of the first"


def test_nothing_is_published_before_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1, [one(torch.ones(4))], {}, WORLD)
    go_on, original = threading.Event(), save_module.write_pieces

    def slow(*arguments: object, **options: object) -> object:
        go_on.wait()
        return original(*arguments, **options)

    monkeypatch.setattr(save_module, "write_pieces", slow)
    saving = Saving(tmp_path, 2, [one(torch.zeros(4))], {}, WORLD, staging=Staging())
    saving.start()
    saving.wait(0.05)
    assert saving.is_writing
    assert find(tmp_path).name == "step_00000001"
    go_on.set()
    assert saving.publish(clean=partial(prune, tmp_path, 0)).name == "step_00000002"
    assert not saving.is_writing


def test_a_save_that_failed_in_the_background_is_told_when_it_is_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1, [one(torch.ones(4))], {}, WORLD)

    def full(path: Path, *_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(save_module, "write_pieces", full)
    saving = Saving(tmp_path, 2, [one(torch.zeros(4))], {}, WORLD, staging=Staging())
    saving.start()
    with pytest.raises(CheckpointError, match=r"rank 0: .*rank_00000\.safetensors +cannot be written: No space left"):
        saving.publish(clean=partial(prune, tmp_path, 0))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000001"]


def test_every_kth_stays(tmp_path: Path) -> None:
    for step in range(10, 80, 10):
        path = save(tmp_path, step, [one(torch.ones(2))], {}, WORLD)
        prune(tmp_path, 2, path, keep_every=30)
    assert [path.name[-2:] for path in complete_steps(tmp_path)] == ["30", "60", "70"]


@pytest.fixture
def bucket() -> Path:
    """An empty directory of fsspec's file system in memory."""
    return place(f"memory://test-{next(_NUMBERS)}/run")


_NUMBERS = itertools.count()


def test_a_url_holds_checkpoints_as_a_directory_does(bucket: Path, console: Console) -> None:
    config = tiny_config()
    values = logical_tensors(config)
    path = write_checkpoint(bucket, config, values)
    assert str(find(bucket)) == str(path)
    assert read_state(bucket)["consumed_samples"] == 80
    assert describe(bucket).step == 10
    verify(bucket, console)
    shards = rank_shards(config, values, {"tp": 2}, {"tp": 1}, fill=False)
    load(bucket, shards)
    for got, want in zip(shards, rank_shards(config, values, {"tp": 2}, {"tp": 1})):
        assert torch.equal(got.tensor.nan_to_num(-1), want.tensor.nan_to_num(-1)), got.name


def test_a_step_saved_again_behind_a_url_leaves_the_old_one_until_the_new_one_is_whole(
    bucket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(bucket, 10, [one(torch.ones(4))], {}, WORLD)
    with monkeypatch.context() as patched:
        patched.setattr(save_module, "write_contents", lambda *_: (_ for _ in ()).throw(OSError(5, "lost")))
        with pytest.raises(CheckpointError, match="lost"):
            save(bucket, 10, [one(torch.zeros(4))], {}, WORLD)
    assert loaded(bucket, torch.zeros(4)).tolist() == [1] * 4
    save(bucket, 10, [one(torch.full((4,), 2.0))], {}, WORLD)
    assert loaded(bucket, torch.zeros(4)).tolist() == [2] * 4
    assert [path.name for path in complete_steps(bucket)] == ["step_00000010.1"]
    save(bucket, 20, [one(torch.ones(4))], {}, WORLD, keep=1)
    assert [path.name for path in complete_steps(bucket)] == ["step_00000020"]


def test_damage_behind_a_url_is_named(bucket: Path) -> None:
    path = save(bucket, 1, [one(torch.arange(4.0))], {}, WORLD)
    file = path / "rank_00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match=r"rank_00000\.safetensors, bytes \d+\.\.\d+ +of tensor w do not match"):
        loaded(bucket, torch.zeros(4))


def test_inspect_reads_behind_a_url(bucket: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = tiny_config()
    path = write_checkpoint(bucket, config, logical_tensors(config))
    assert exit_code("inspect", bucket, "--verify") == 0
    shown = capfd.readouterr().out
    assert shown.startswith(f"checkpoint {path}\n  step               10, 80 samples consumed\n")
    assert shown.endswith("\nall checksums match\n")
    (path / "rank_00000.safetensors").write_bytes(b"something else")
    assert exit_code("inspect", bucket, "--verify") == 2
    assert "rank_00000.safetensors" in capfd.readouterr().err
    assert exit_code("inspect", bucket / "nothing") == 2
    assert "no such file" in capfd.readouterr().err


def test_a_url_of_an_unknown_scheme() -> None:
    with pytest.raises(ConfigError, match=r"nowhere://x +is not a URL that can be opened"):
        place("nowhere://x")


def test_a_recycled_file_holds_nothing_of_the_old_checkpoint(tmp_path: Path) -> None:
    """Steps 10 and 20, then 30 in the space of 10: shorter, and without a file of a rank that is gone."""
    for step in (10, 20):
        save(tmp_path, step, [one(torch.randn(500))], {}, WORLD, keep=1, recycle=True)
    spare = tmp_path / "spare.tmp"
    (spare / "rank_00001.safetensors").write_bytes(b"of another layout")
    inode = (spare / "rank_00000.safetensors").stat().st_ino
    path = save(tmp_path, 30, [one(torch.arange(100.0))], {}, WORLD, keep=1, recycle=True)
    assert (path / "rank_00000.safetensors").stat().st_ino == inode
    assert sorted(file.name for file in path.iterdir()) == ["manifest.json", "rank_00000.safetensors", "state.json"]
    assert torch.equal(loaded(tmp_path, torch.zeros(100)), torch.arange(100.0))
    assert len((path / "rank_00000.safetensors").read_bytes()) < 600


@pytest.mark.parametrize("shared", ["hard link", "symbolic link", "directory link", "folder inside"])
def test_what_may_be_someone_elses_is_not_written_over(tmp_path: Path, shared: str) -> None:
    """A copy made by hard links, and a checkpoint that was moved away and linked to, keep their contents."""
    root = tmp_path / "root"
    path = save(root, 10, [one(torch.ones(4))], {}, WORLD)
    file, theirs = path / "rank_00000.safetensors", tmp_path / "theirs"
    if shared == "hard link":
        theirs.hardlink_to(file)
    elif shared == "symbolic link":
        file.rename(theirs)
        file.symlink_to(theirs)
    elif shared == "directory link":
        path.rename(tmp_path / "moved")
        path.symlink_to(tmp_path / "moved")
        theirs = tmp_path / "moved/rank_00000.safetensors"
    else:
        theirs = tmp_path / "theirs"
        theirs.write_bytes(file.read_bytes())
        (path / "mine").mkdir()
    content = theirs.read_bytes()
    for step in (20, 30):
        save(root, step, [one(torch.full((4,), float(step)))], {}, WORLD, keep=1, recycle=True)
    assert theirs.read_bytes() == content
    assert loaded(root, torch.zeros(4)).tolist() == [30] * 4
