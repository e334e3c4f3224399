"""Manifests and files made to mislead, with right checksums where one can compute them: one clear error each."""

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from ranks_and_models import WORLD, edit_manifest
from rich.console import Console

from megascratch.checkpoint import Shard, describe, load, read_state, save, verify
from megascratch.checkpoint.format import check_tiling
from megascratch.dist.layout import Extent
from megascratch.errors import CheckpointError

FILE = "rank_00000.safetensors"
Edit = Callable[[dict[str, Any]], None]


def halves() -> list[Shard]:
    """`w` [4, 2] in two pieces of two rows, and `b` [3]."""
    rows = [(slice(0, 2), slice(2 * i, 2 * i + 2)) for i in range(2)]
    shards = [
        Shard("w", (4, 2), torch.full((2, 2), 1.0 + i), [Extent((own, slice(0, 2)), (there, slice(0, 2)))])
        for i, (own, there) in enumerate(rows)
    ]
    return [*shards, Shard("b", (3,), torch.ones(3), [Extent((slice(0, 3),), (slice(0, 3),))])]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return save(tmp_path / "run", 7, halves(), {"consumed_samples": 56}, WORLD)


def piece(manifest: dict[str, Any], index: int = 0) -> dict[str, Any]:
    return manifest["tensors"]["w"]["pieces"][index]


def put(*keys: Any, value: Any) -> Edit:
    def edit(manifest: dict[str, Any]) -> None:
        target = manifest
        for key in keys[:-1]:
            target = target[key]
        target[keys[-1]] = value

    return edit


def twice(manifest: dict[str, Any]) -> None:
    manifest["tensors"]["w"]["pieces"].append(copy.deepcopy(piece(manifest)))


def shifted(manifest: dict[str, Any]) -> None:
    piece(manifest, 1)["box"] = [[1, 3], [0, 2]]  # the volume is right, row 1 is there twice and row 3 not at all


def elsewhere(name: str) -> Edit:
    def edit(manifest: dict[str, Any]) -> None:
        manifest["files"][name] = manifest["files"].pop(FILE)
        for record in manifest["tensors"].values():
            for p in record["pieces"]:
                p["file"] = name

    return edit


W = ("tensors", "w", "pieces", 0)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (put("version", value=2), "version = 2 +this megascratch reads version 1"),
        (put("format", value="zip"), "format = 'zip' +must be 'megascratch checkpoint'"),
        (put("extra", value=1), "extra +breaks the format"),
        (put("step", value="7"), "step +breaks the format"),
        (put("step", value=True), "step +breaks the format"),
        (put("chunk_bytes", value=0), "chunk_bytes = 0"),
        (put("chunk_bytes", value=12), "chunk_bytes = 12"),
        (put("chunk_bytes", value=1 << 50), "chunk_bytes = "),
        (twice, "tensor w +has pieces that overlap"),
        (shifted, r"tensor w +has pieces that overlap: w\[0:2,0:2\] and w\[1:3,0:2\]"),
        (lambda m: m["tensors"]["w"]["pieces"].pop(), "tensor w +lacks 4 of its 8 elements"),
        (put(*W, "box", value=[[0, 2]]), r"must lie inside shape \[4, 2\]"),
        (put(*W, "box", value=[[-1, 1], [0, 2]]), "must lie inside shape"),
        (put(*W, "box", value=[[1, 1], [0, 2]]), "must lie inside shape"),
        (put(*W, "box", value=[[0, 2], [0, 3]]), "must lie inside shape"),
        (put(*W, "file", value="other.safetensors"), "is not in the manifest's list of files"),
        (elsewhere("../secret.safetensors"), "must be a plain .*name in the checkpoint's directory"),
        (elsewhere("/etc/passwd"), "must be a plain .*name in the checkpoint's directory"),
        (elsewhere("there.safetensors"), "there.safetensors +is missing"),
        (put(*W, "offset", value=1 << 40), r"claims bytes \d+\.\.\d+ of rank_00000.safetensors"),
        (put(*W, "offset", value=0), "claims bytes 0..16"),
        (put(*W, "offset", value=-8), "claims bytes -8..8"),
        (put(*W, "bytes", value=1 << 50), "bytes where its box has 16"),
        (put(*W, "xxh3", value=[]), "has 0 checksums for 1 chunks"),
        (put(*W, "xxh3", value=["0" * 16]), "of tensor w do not match their checksum"),
        (put("tensors", "w", "dtype", value="O"), "tensor w: dtype 'O' +must be one of F64"),
        (put("tensors", "w", "shape", value=[4, 0]), "has an impossible shape"),
        (put("tensors", "w", "shape", value=[1 << 40, 1 << 40]), "has an impossible shape"),
        (put("tensors", "w", "shape", value=[1 << 20, 1 << 20]), "lacks .* elements"),
        (put("tensors", "\x1b[2J", value={"shape": [1], "dtype": "F32", "pieces": []}), "must be named with letters"),
        (put("files", FILE, "bytes", value=1 << 45), r"has \d+ bytes, the manifest says 35184372088832"),
        (put("files", FILE, "header_bytes", value=1 << 45), "impossible header"),
    ],
)
def test_a_misleading_manifest_is_refused(path: Path, edit: Edit, message: str) -> None:
    edit_manifest(path, edit)
    with pytest.raises(CheckpointError, match=message):
        load(path, halves())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "is not the JSON of a checkpoint's manifest"),
        (b"[" * 100_000, "is not the JSON of a checkpoint's manifest"),
        (b"\xff\xfe", "is not the JSON of a checkpoint's manifest"),
        (b'{"format": "megascratch checkpoint", "version": 1e999}', "is not the JSON|version"),
        (b'{"format": "megascratch checkpoint", "version": 1}', "breaks the format"),
    ],
)
def test_a_manifest_that_is_no_manifest(path: Path, text: bytes, message: str) -> None:
    (path / "manifest.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=message):
        load(path, halves())


def test_a_huge_manifest_is_not_read(path: Path) -> None:
    os.truncate(path / "manifest.json", 1 << 40)  # sparse
    with pytest.raises(CheckpointError, match=r"manifest.json +has 1099511627776 bytes, more than"):
        load(path, halves())


def test_a_huge_state_is_not_read(path: Path) -> None:
    os.truncate(path / "state.json", 1 << 40)
    with pytest.raises(CheckpointError, match=r"state.json +has 1099511627776 bytes, more than"):
        read_state(path)


@pytest.mark.parametrize("text", [b"[1]", b"[" * 100_000, b"{"])
def test_a_state_with_a_right_checksum_that_is_no_table(path: Path, text: bytes) -> None:
    (path / "state.json").write_bytes(text)
    edit_manifest(path, put("state", value={"bytes": len(text), "xxh3": xxhash.xxh3_64_hexdigest(text)}))
    with pytest.raises(CheckpointError, match=r"must hold a table|is not JSON"):
        read_state(path)


def test_a_link_does_not_lead_out(path: Path, tmp_path: Path) -> None:
    (path / FILE).rename(tmp_path / FILE)
    (path / FILE).symlink_to(tmp_path / FILE)
    with pytest.raises(CheckpointError, match=f"{FILE} +cannot be opened"):
        load(path, halves())


def test_a_pipe_does_not_hang(path: Path) -> None:
    (path / FILE).unlink()
    os.mkfifo(path / FILE)
    with pytest.raises(CheckpointError, match=f"{FILE} +is not a regular file"):
        load(path, halves())


def test_a_missing_piece_file(path: Path) -> None:
    (path / FILE).unlink()
    with pytest.raises(CheckpointError, match=f"{FILE} +is missing +restore the file, or load another checkpoint"):
        load(path, halves())


@pytest.mark.parametrize("change", [-1, 1])
def test_a_file_of_another_length(path: Path, change: int) -> None:
    size = (path / FILE).stat().st_size
    os.truncate(path / FILE, size + change)
    with pytest.raises(CheckpointError, match=f"{FILE} +has {size + change} bytes, the manifest says {size}"):
        load(path, halves())


def test_verify_names_every_damaged_place(path: Path, console: Console) -> None:
    verify(path, console)
    data = bytearray((path / FILE).read_bytes())
    for p in (piece(json.loads((path / "manifest.json").read_text()), i) for i in range(2)):
        data[p["offset"]] ^= 1
    (path / FILE).write_bytes(data)
    with pytest.raises(CheckpointError, match=r"^2 problems in .*step_00000007") as caught:
        verify(path, console)
    assert len(caught.value.problems) == 2


def test_describe(path: Path) -> None:
    description = describe(path.parent)
    assert (description.step, description.consumed_samples, description.n_files) == (7, 56, 1)
    assert (description.n_parameters, description.bytes) == (11, 44)
    assert (description.tensors["w"].shape, description.tensors["w"].dtype) == ((4, 2), "F32")
    assert len(description.tensors["w"].pieces) == 2


def test_tiling_of_many_pieces_is_checked_in_little_time() -> None:
    """Ten thousand ranks: all pairs would be 50 million comparisons, over a minute."""
    n = 10_000
    for shape, boxes in [
        ((n, 3), [(slice(i, i + 1), slice(0, 3)) for i in range(n)]),
        ((3, n), [(slice(0, 3), slice(i, i + 1)) for i in range(n)]),
    ]:
        check_tiling("w", shape, boxes, Path("manifest.json"))
        with pytest.raises(CheckpointError, match=r"overlap"):
            check_tiling("w", shape, [*boxes[:-1], boxes[n // 2]], Path("manifest.json"))
