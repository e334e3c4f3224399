"""Conversion between layouts: bit for bit, with no more than a piece in memory, and nothing overwritten."""

import weakref
from pathlib import Path

import pytest
import torch
from ranks_and_models import WORLD, edit_manifest, logical_tensors, rank_shards, tiny_config, write_checkpoint
from rich.console import Console
from torch import Tensor

from megascratch.checkpoint import convert, describe, load, read_state, save, verify
from megascratch.checkpoint.load import Reader
from megascratch.config import Config, config_from_dict
from megascratch.dist.mesh import MeshSpec
from megascratch.errors import CheckpointError, ConfigError

Tiny = tuple[Path, Config, dict[str, Tensor]]


def contents(path: Path) -> dict[str, bytes]:
    """Return the bytes of every file; the manifest's and state's differ by what the conversion must change alone."""
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_a_converted_checkpoint_holds_the_same_numbers(
    tmp_path: Path, tiny: Tiny, console: Console, tp: int, pp: int
) -> None:
    src, config, values = tiny
    dst = convert(src, tmp_path / "out", tp=tp, pp=pp, console=console)
    verify(dst, console)
    for spec in (MeshSpec(), MeshSpec(tp=2, pp=2, dp=2)):
        for rank in range(spec.world_size):
            got = rank_shards(config, values, spec.sizes, spec.coords(rank), fill=False)
            load(dst, got)
            for a, b in zip(got, rank_shards(config, values, spec.sizes, spec.coords(rank))):
                assert torch.equal(a.tensor.nan_to_num(-1), b.tensor.nan_to_num(-1)), a.name
    description = describe(dst)
    assert description.layout == {"pp": pp, "dp": 1, "cp": 1, "tp": tp}
    assert (description.step, description.consumed_samples, description.n_files) == (10, 80, tp * pp)
    assert config_from_dict(read_state(dst)["config"]).model == config.model


def test_each_rank_of_the_layout_reads_one_file(tmp_path: Path, tiny: Tiny, console: Console) -> None:
    src, config, values = tiny
    dst = convert(src, tmp_path / "out", tp=2, pp=2, weights_only=True, console=console)
    (dst / "pp_000_tp_000.safetensors").unlink()  # holds what every tensor-parallel rank of stage 0 has, and rank 0's
    weights = {name: value for name, value in values.items() if not name.startswith("optim/")}
    load(dst, rank_shards(config, weights, {"tp": 2, "pp": 2}, {"tp": 0, "pp": 1}, fill=False))
    with pytest.raises(CheckpointError, match=r"pp_000_tp_000.safetensors +is missing"):
        load(dst, rank_shards(config, weights, {"tp": 2, "pp": 2}, {"tp": 0, "pp": 0}, fill=False))


def test_there_and_back_is_the_same_file(tmp_path: Path, tiny: Tiny, console: Console) -> None:
    src, _, _ = tiny
    one = convert(src, tmp_path / "one", console=console)
    four = convert(one, tmp_path / "four", tp=2, pp=2, console=console)
    again = convert(four, tmp_path / "again", console=console)
    assert contents(one) == contents(again)


def test_memory_is_bounded_by_the_largest_piece(
    tmp_path: Path, tiny: Tiny, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every tensor that conversion allocates is at most one piece, and is freed when it is written."""
    src, _, values = tiny
    alive: list[weakref.ref] = []
    largest, most_alive = 0, 0
    original = torch.empty

    def counted(*args, **kwargs):
        nonlocal largest, most_alive
        tensor = original(*args, **kwargs)
        if kwargs.get("dtype") != torch.uint8 and kwargs.get("device") is None:
            largest = max(largest, tensor.numel() * tensor.itemsize)
            alive.append(weakref.ref(tensor))
            most_alive = max(most_alive, sum(ref() is not None for ref in alive))
        return tensor

    monkeypatch.setattr(torch, "empty", counted)
    convert(src, tmp_path / "out", tp=2, console=console)
    pieces = [p for record in Reader(tmp_path / "out").manifest.tensors.values() for p in record.pieces]
    assert largest == max(piece.bytes for piece in pieces)
    assert largest < max(value.numel() * 4 for value in values.values())
    assert most_alive <= 2  # the one being made, while the last one's name still stands


def test_dtype_and_weights_only(tmp_path: Path, tiny: Tiny, console: Console) -> None:
    src, _, values = tiny
    dst = convert(src, tmp_path / "out", dtype="bf16", weights_only=True, console=console)
    description = describe(dst)
    assert all(record.dtype == "BF16" for record in description.tensors.values())
    assert set(description.tensors) == {name for name in values if not name.startswith("optim/")}
    assert description.config["train"]["dtype"] == "bf16"
    assert read_state(dst).keys() == {"step", "consumed_samples", "config"}
    with pytest.raises(CheckpointError, match=r"dtype = bf16 +would part the weights from the optimizer's copy"):
        convert(src, tmp_path / "no", dtype="bf16", console=console)
    with pytest.raises(CheckpointError, match=r"dtype = int3 +is not a dtype +use fp64, fp32, bf16, fp16"):
        convert(src, tmp_path / "no", dtype="int3", console=console)
    assert not (tmp_path / "no").exists()


def test_nothing_is_overwritten(tmp_path: Path, tiny: Tiny, console: Console) -> None:
    src, _, _ = tiny
    (tmp_path / "mine").mkdir()
    with pytest.raises(CheckpointError, match=r"exists already: nothing is overwritten"):
        convert(src, tmp_path / "mine", console=console)
    assert not list((tmp_path / "mine").iterdir())


def test_an_impossible_layout_is_refused_first(tmp_path: Path, tiny: Tiny, console: Console) -> None:
    src, _, _ = tiny
    with pytest.raises(ConfigError, match=r"parallel.tp = 4 +must divide model.n_kv_heads = 2"):
        convert(src, tmp_path / "out", tp=4, console=console)
    with pytest.raises(ConfigError, match=r"make 3 stages of 2 layers"):
        convert(src, tmp_path / "out", pp=3, console=console)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_damage_in_the_source_leaves_no_half_checkpoint(tmp_path: Path, tiny: Tiny, console: Console) -> None:
    src, _, _ = tiny
    file = src / "rank_00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"do not match their checksum"):
        convert(src, tmp_path / "out", console=console)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_checkpoint_that_does_not_fit_its_own_configuration(tmp_path: Path, console: Console) -> None:
    config = tiny_config()
    values = logical_tensors(config, optimizer=False)
    path = write_checkpoint(tmp_path / "run", config, values)
    edit_manifest(path, lambda manifest: manifest["tensors"].pop("norm.weight"))
    with pytest.raises(CheckpointError, match=r"tensor norm.weight +is not in the checkpoint"):
        convert(path, tmp_path / "out", console=console)


def test_a_checkpoint_without_configuration(tmp_path: Path, tiny: Tiny, console: Console) -> None:
    _, config, values = tiny
    path = save(tmp_path / "bare", 1, rank_shards(config, values, {}, {}), {}, WORLD)
    with pytest.raises(CheckpointError, match=r"config +is not in state.json"):
        convert(path, tmp_path / "out", console=console)
