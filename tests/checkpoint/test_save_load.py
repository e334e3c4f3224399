"""Saving and loading on one rank: what is read is what was written, and a kill or a full disk loses nothing."""

import importlib
import math
import os
import pkgutil
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ranks_and_models import WORLD, cut, cut_run, logical_tensors, rank_shards, tiny_config
from safetensors import safe_open

from megascratch.checkpoint import Shard, find, load, read_state, save
from megascratch.dist.layout import Extent, ParamSpec, Split, extents
from megascratch.dist.testing import RankDied, RankPool
from megascratch.errors import CheckpointError

save_module = importlib.import_module("megascratch.checkpoint.save")  # the package's `save` is the function
pieces_module = importlib.import_module("megascratch.checkpoint.pieces")


def whole(name: str, value: torch.Tensor) -> Shard:
    return Shard(name, tuple(value.shape), value, extents(ParamSpec(name, tuple(value.shape)), {}, {}))


def read_whole(path: Path, name: str, like: torch.Tensor, cast: bool = False) -> torch.Tensor:
    shard = whole(name, torch.full_like(like, -1))
    load(path, [shard], cast=cast)
    return shard.tensor


@pytest.mark.parametrize("chunk", [16, 4096])
def test_every_dtype_comes_back_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    for module in (save_module, pieces_module):
        monkeypatch.setattr(module, "CHUNK_BYTES", chunk)
    values = {str(d): torch.randn(5, 3).to(d) for d in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}
    values |= {str(d): torch.arange(7).to(d) for d in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)}
    values["scalar"] = torch.tensor(3.25)
    values["nan"] = torch.tensor([float("nan"), -0.0, float("inf")])
    path = save(tmp_path, 1, [whole(name, value) for name, value in values.items()], {}, WORLD)
    for name, value in values.items():
        back = read_whole(path, name, value)
        assert back.view(-1).view(torch.uint8).tolist() == value.view(-1).view(torch.uint8).tolist()


def test_safetensors_opens_the_pieces(tmp_path: Path) -> None:
    spec = ParamSpec("w", (4, 6), (Split(1, "tp"),))
    value = torch.arange(24.0).view(4, 6)
    parts = [cut("w", value, spec, {"tp": 2}, {"tp": rank}) for rank in range(2)]
    path = save(tmp_path, 1, [*parts, whole("b", torch.ones(3, dtype=torch.bfloat16))], {}, WORLD)
    with safe_open(path / "rank_00000.safetensors", framework="pt") as pieces:
        assert torch.equal(pieces.get_tensor("w[0:4,0:3]"), value[:, :3])
        assert torch.equal(pieces.get_tensor("w[0:4,3:6]"), value[:, 3:])
        assert torch.equal(pieces.get_tensor("b"), torch.ones(3, dtype=torch.bfloat16))


def test_state_and_latest(tmp_path: Path) -> None:
    for step in (5, 10):
        save(tmp_path, step, [whole("w", torch.ones(2))], {"consumed_samples": step * 8}, WORLD)
    assert (tmp_path / "latest").read_text() == "step_00000010\n"
    assert read_state(tmp_path) == {"step": 10, "consumed_samples": 80}
    assert read_state(tmp_path / "step_00000005")["consumed_samples"] == 40
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_00000005", "step_00000010"]


@st.composite
def layouts(draw: st.DrawFn) -> tuple[ParamSpec, int, int]:
    """A spec, a tensor-parallel size that divides it, and a data-parallel size that need not."""
    tp = draw(st.integers(1, 3))
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    kind = draw(st.sampled_from(["whole", "split", "blocks", "pad"]))
    dim = draw(st.integers(0, len(shape) - 1)) if kind == "split" else 0  # fused and padded tensors are so by rows
    if kind == "whole":
        return ParamSpec("w", tuple(shape)), tp, draw(st.integers(1, 5))
    if kind == "pad":
        pad = -shape[dim] % tp
        return ParamSpec("w", tuple(shape), (Split(dim, "tp", pad=pad),)), tp, draw(st.integers(1, 5))
    blocks = [n * tp for n in draw(st.lists(st.integers(1, 2), min_size=1, max_size=3))]
    shape[dim] = sum(blocks)
    split = Split(dim, "tp", tuple(blocks) if kind == "blocks" else ())
    return ParamSpec("w", tuple(shape), (split,)), tp, draw(st.integers(1, 5))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(saved=layouts(), tp=st.integers(1, 3), dp=st.integers(1, 4), chunk=st.sampled_from([8, 16, 64, 4096]))
def test_random_splits_and_runs_round_trip(
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    saved: tuple[ParamSpec, int, int],
    tp: int,
    dp: int,
    chunk: int,
) -> None:
    """What any (tp, dp) saved as ZeRO runs, any other loads: against slices of the dense tensor."""
    for module in (save_module, pieces_module):
        monkeypatch.setattr(module, "CHUNK_BYTES", chunk)
    spec, saved_tp, saved_dp = saved
    value = torch.arange(1.0, 1 + math.prod(spec.shape)).view(spec.shape)
    sizes = {"tp": saved_tp, "dp": saved_dp}
    shards = []
    for rank in range(saved_tp if spec.splits else 1):
        for data in range(saved_dp):
            coords = {"tp": rank, "dp": data}
            shards.append(cut_run(cut("w", value, spec, sizes, coords), spec, sizes, coords))
    path = save(tmp_path_factory.mktemp("run"), 1, shards, {}, WORLD)
    splits: list[tuple[Split, ...]] = [(), (Split(0, "tp", pad=-spec.shape[0] % tp),)]
    splits += [(Split(d, "tp"),) for d, n in enumerate(spec.shape) if n % tp == 0]
    for split in splits:
        other, sizes = ParamSpec("w", spec.shape, split), {"tp": tp, "dp": dp}
        for rank in range(tp):
            for data in range(dp):
                coords = {"tp": rank, "dp": data}
                dense = cut("w", value, other, sizes, coords)
                got = cut("w", value, other, sizes, coords, fill=False)
                run, dense_run = (cut_run(s, other, sizes, coords) for s in (got, dense))
                load(path, [got, run])
                assert torch.equal(got.tensor.nan_to_num(-1), dense.tensor.nan_to_num(-1))
                assert torch.equal(run.tensor.nan_to_num(-1), dense_run.tensor.nan_to_num(-1))


def test_a_part_reads_only_the_chunks_it_touches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (save_module, pieces_module):
        monkeypatch.setattr(module, "CHUNK_BYTES", 64)
    value = torch.arange(64.0).view(8, 8)  # two rows a chunk
    path = save(tmp_path, 1, [whole("w", value)], {}, WORLD)
    flip(path / "rank_00000.safetensors", -1)  # in the last row
    upper = Shard("w", (8, 8), torch.zeros(3, 8), [Extent((slice(0, 3), slice(0, 8)), (slice(2, 5), slice(0, 8)))])
    load(path, [upper])
    assert torch.equal(upper.tensor, value[2:5])
    with pytest.raises(CheckpointError, match=r"rank_00000.safetensors, bytes \d+\.\.\d+ +of tensor w do not match"):
        read_whole(path, "w", value)


def test_cast_is_by_request_only(tmp_path: Path) -> None:
    value = torch.randn(4, 4)
    path = save(tmp_path, 1, [whole("w", value), whole("ids", torch.arange(4))], {}, WORLD)
    with pytest.raises(CheckpointError, match=r"tensor w +is F32 in the checkpoint, torch.bfloat16 was asked for"):
        read_whole(path, "w", value.bfloat16())
    assert torch.equal(read_whole(path, "w", value.bfloat16(), cast=True), value.bfloat16())
    with pytest.raises(CheckpointError, match=r"tensor ids +is I64"):
        read_whole(path, "ids", torch.zeros(4), cast=True)


def test_all_that_does_not_fit_is_named_before_anything_is_read(tmp_path: Path) -> None:
    path = save(tmp_path, 1, [whole("w", torch.ones(4)), whole("u", torch.ones(4))], {}, WORLD)
    fits = whole("u", torch.zeros(4))
    with pytest.raises(CheckpointError) as caught:
        load(path, [fits, whole("w", torch.zeros(5)), whole("gone", torch.zeros(1))])
    assert "tensor w" in str(caught.value)
    assert "has shape [4] in the checkpoint, the model has [5]" in str(caught.value)
    assert "tensor gone  is not in the checkpoint" in str(caught.value)
    assert not fits.tensor.any()


def test_parameters_are_filled_in_place(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.zeros(3, 2))
    path = save(tmp_path, 1, [whole("w", torch.ones(3, 2))], {}, WORLD)
    load(path, [whole("w", parameter)])
    assert torch.equal(parameter.detach(), torch.ones(3, 2))


def test_keep_deletes_the_oldest_and_never_the_one_just_saved(tmp_path: Path) -> None:
    shards = [whole("w", torch.ones(2))]
    for step in (10, 20, 30):
        save(tmp_path, step, shards, {}, WORLD)
    save(tmp_path, 15, shards, {}, WORLD, keep=2)  # the run was set back to 10; 20 is the older of the abandoned
    assert sorted(p.name for p in tmp_path.glob("step_*")) == ["step_00000015", "step_00000030"]
    save(tmp_path, 25, shards, {}, WORLD, keep=1)
    assert sorted(p.name for p in tmp_path.glob("step_*")) == ["step_00000025"]
    assert find(tmp_path).name == "step_00000025"


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 10, [whole("w", torch.ones(2))], {}, WORLD)
    path = save(tmp_path, 10, [whole("w", torch.full((2,), 5.0))], {}, WORLD)
    assert read_whole(path, "w", torch.zeros(2)).tolist() == [5, 5]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_00000010"]


def _save_and_die(root: Path, step: int, owner: str, name: str, call: int, recycle: bool) -> None:
    """Save, and be killed instead of making the given call (1 is the first) of a function."""
    place = pkgutil.resolve_name(owner)
    original, calls = getattr(place, name), 0

    def counted(*args: object, **options: object) -> object:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **options)

    setattr(place, name, counted)
    save(root, step, [whole("w", torch.full((2,), 2.0))], {}, WORLD, keep=1, recycle=recycle)
    setattr(place, name, original)


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool() as ranks:
        yield ranks


SAVE, PIECES, PLACES = (f"megascratch.checkpoint.{name}:" for name in ("save", "pieces", "places"))
POINTS = [(SAVE, name, 1) for name in ("take_spare", "write_contents", "_swap_in", "replace_text", "prune")]
POINTS += [(PIECES, name, 1) for name in ("_write_hashed", "start_flush", "digest", "flush_directory")]
POINTS += [(module, "flush_directory", 1) for module in (SAVE, PLACES)]
POINTS += [("pathlib:Path", name, call) for name in ("rename", "replace", "mkdir", "unlink") for call in (1, 2, 3)]
POINTS += [("os", "fsync", call) for call in range(1, 10)]


@pytest.mark.parametrize(("step", "recycle"), [(10, False), (20, False), (10, True), (20, True)])
@pytest.mark.parametrize(("owner", "name", "call"), POINTS)
def test_a_kill_at_any_point_leaves_a_good_checkpoint(
    tmp_path: Path, pool: RankPool, step: int, recycle: bool, owner: str, name: str, call: int
) -> None:
    """Also between the two renames that replace a checkpoint of the same step, and while step 5 is written over."""
    for before in (5, 10):
        save(tmp_path, before, [whole("w", torch.ones(2))], {}, WORLD, keep=1, recycle=recycle)
    assert (tmp_path / "spare.tmp").exists() == recycle
    with suppress(RankDied):  # or to its end, where there is no such call
        pool.run(1, _save_and_die, tmp_path, step, owner, name, call, recycle)
    assert read_whole(tmp_path, "w", torch.zeros(2)).tolist() in ([1, 1], [2, 2])
    save(tmp_path, step, [whole("w", torch.full((2,), 3.0))], {}, WORLD)  # and the next save is not in its way
    assert read_whole(tmp_path, "w", torch.zeros(2)).tolist() == [3, 3]


def test_a_failing_write_says_so_and_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 10, [whole("w", torch.ones(2))], {}, WORLD)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"rank 0.*No space left on device"):
        save(tmp_path, 20, [whole("w", torch.zeros(2))], {}, WORLD)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_00000010"]
    assert read_whole(tmp_path, "w", torch.zeros(2)).tolist() == [1, 1]


def test_root_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match=r"cannot be written"):
        save(tmp_path / "file", 10, [whole("w", torch.ones(2))], {}, WORLD)
    assert (tmp_path / "file").read_text() == "mine"


def test_pieces_that_do_not_tile_are_not_published(tmp_path: Path) -> None:
    half = Shard("w", (4,), torch.ones(2), [Extent((slice(0, 2),), (slice(0, 2),))])
    with pytest.raises(CheckpointError, match=r"tensor w +lacks 2 of its 4 elements"):
        save(tmp_path, 1, [half], {}, WORLD)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: root / "nothing", "does not exist"),
        (lambda root: root, "holds neither manifest.json nor latest"),
        (lambda root: (root / "latest").write_text("../../etc") and root, "must name a checkpoint"),
        (lambda root: (root / "latest").write_text("step_00000009") and root, "names a checkpoint that is not there"),
        (lambda root: root / "step_00000009.tmp", "was not finished"),
    ],
)
def test_find_refuses(tmp_path: Path, make, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        find(make(tmp_path))


def test_find_offers_a_complete_one_where_latest_is_missing(tmp_path: Path) -> None:
    save(tmp_path, 10, [whole("w", torch.ones(2))], {}, WORLD)
    (tmp_path / "latest").unlink()
    with pytest.raises(CheckpointError, match=r"give .*step_00000010"):
        find(tmp_path)


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)


def test_a_flipped_bit_anywhere_is_found(tmp_path: Path) -> None:
    """Every byte of every file of a small checkpoint, one at a time."""
    value = torch.arange(6.0)
    path = save(tmp_path, 1, [whole("w", value)], {"consumed_samples": 8}, WORLD)

    def restore() -> None:
        read_state(path)
        read_whole(path, "w", value)

    for file in sorted(path.iterdir()):
        good = file.read_bytes()
        for offset in range(len(good)):
            flip(file, offset)
            with pytest.raises(CheckpointError):
                restore()
            file.write_bytes(good)
    assert torch.equal(read_whole(path, "w", value), value)


def test_zero_runs_and_tied_copies_of_a_whole_model(tmp_path: Path) -> None:
    """Four hand-made ranks save as one process; the dense tensors come back, and so does every rank's part."""
    config = tiny_config(tie_embeddings=True)
    values = logical_tensors(config)
    sizes = {"tp": 2, "dp": 2}
    places = [{"tp": t, "dp": d} for t in range(2) for d in range(2)]
    shards = [shard for coords in places for shard in rank_shards(config, values, sizes, coords)]
    path = save(tmp_path, 1, shards, {}, WORLD)
    for name, value in values.items():
        assert torch.equal(read_whole(path, name, value), value)
    for coords in places:
        wanted = rank_shards(config, values, sizes, coords)
        got = rank_shards(config, values, sizes, coords, fill=False)
        load(path, got)
        for a, b in zip(got, wanted):
            assert torch.equal(a.tensor.nan_to_num(-1), b.tensor.nan_to_num(-1)), a.name
