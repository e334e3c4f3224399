"""Damage to checkpoints, and checkpoints made to mislead."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import xxhash
from fault_table import EXACT, fault
from ground import Ground
from rich.console import Console

from megascratch.checkpoint import load, verify
from megascratch.checkpoint.load import Reader
from megascratch.checkpoint.load import tensor_shard as shard_of
from megascratch.dist.layout import Box
from megascratch.engine import pretrain

DAMAGED, MISLEADING = "Damaged checkpoints", "Checkpoints made to mislead"
PIECES = "rank_00000.safetensors"


def load_all(path: Path) -> None:
    """Load every tensor of a checkpoint."""
    reader = Reader(path)
    reader.state()
    for name, record in reader.manifest.tensors.items():
        box: Box = tuple(slice(0, n) for n in record.shape)
        load(path, [shard_of(name, record, box, torch.float32)])


def change(file: Path, edit: Callable[[bytearray], None]) -> None:
    data = bytearray(file.read_bytes())
    edit(data)
    file.write_bytes(data)


def flip(offset: int) -> Callable[[bytearray], None]:
    def edit(data: bytearray) -> None:
        data[offset] ^= 16

    return edit


def rewrite(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Change a manifest, and give it a right checksum, as an attacker would."""
    manifest = json.loads((path / "manifest.json").read_text())
    edit(manifest)
    manifest["xxh3"] = ""
    manifest["xxh3"] = xxhash.xxh3_64_hexdigest(json.dumps(manifest, separators=(",", ":")).encode())
    (path / "manifest.json").write_text(json.dumps(manifest, separators=(",", ":")))


def first_piece(manifest: dict[str, Any]) -> dict[str, Any]:
    return manifest["tensors"]["embed.weight"]["pieces"][0]


@fault(
    DAMAGED, "a flipped bit in a weight", f"{PIECES}, bytes … of tensor … do not match their checksum: they are damaged"
)
def flipped(ground: Ground) -> str:
    path = ground.stopped()
    change(path / PIECES, flip(-100))
    return ground.said_by(lambda: load_all(path))


@fault(DAMAGED, "a flipped bit in a file's header", f"{PIECES}, bytes 0..… do not match the checksum of the header")
def flipped_header(ground: Ground) -> str:
    path = ground.stopped()
    change(path / PIECES, flip(30))
    return ground.said_by(lambda: load_all(path))


@fault(DAMAGED, "a flipped bit in the manifest", "manifest.json … damaged")
def flipped_manifest(ground: Ground) -> str:
    path = ground.stopped()
    change(path / "manifest.json", flip(2000))
    return ground.said_by(lambda: load_all(path))


@fault(DAMAGED, "a flipped bit in state.json", "state.json does not match its checksum: it is damaged")
def flipped_state(ground: Ground) -> str:
    path = ground.stopped()
    change(path / "state.json", flip(40))
    return ground.said_by(lambda: load_all(path))


@fault(DAMAGED, "a truncated file", f"{PIECES} has … bytes, the manifest says …")
def truncated(ground: Ground) -> str:
    path = ground.stopped()
    os.truncate(path / PIECES, (path / PIECES).stat().st_size - 4096)
    return ground.said_by(lambda: load_all(path))


@fault(DAMAGED, "a hole of zeros, as after a power cut", f"{PIECES}, bytes … of tensor … do not match their checksum")
def hole(ground: Ground) -> str:
    path = ground.stopped()
    change(path / PIECES, lambda data: data.__setitem__(slice(-5000, -1000), bytes(4000)))
    return ground.said_by(lambda: load_all(path))


@fault(DAMAGED, "files of two checkpoints swapped", f"{PIECES}, bytes … do not match …")
def swapped_files(ground: Ground) -> str:
    path = ground.stopped()
    shutil.copy(path.with_name("step_00000002") / PIECES, path / PIECES)
    return ground.said_by(lambda: load_all(path))


@fault(DAMAGED, "two pieces of a file swapped", f"{PIECES}, bytes … of tensor … do not match their checksum")
def swapped_pieces(ground: Ground) -> str:
    path = ground.stopped()
    pieces = json.loads((path / "manifest.json").read_text())["tensors"]
    one, two = (pieces[f"layers.{i}.mlp.down.weight"]["pieces"][0] for i in range(2))

    def swap(data: bytearray) -> None:
        a, b = (slice(p["offset"], p["offset"] + p["bytes"]) for p in (one, two))
        data[a], data[b] = data[b], data[a]

    change(path / PIECES, swap)
    return ground.said_by(lambda: load_all(path))


@fault(DAMAGED, "the manifest of an earlier checkpoint", "… do not match … damaged")
def stale_manifest(ground: Ground) -> str:
    path = ground.stopped()
    for name in ("manifest.json", "state.json"):
        shutil.copy(path.with_name("step_00000002") / name, path / name)
    return ground.said_by(lambda: load_all(path))


@fault(DAMAGED, "a missing file", f"{PIECES} is missing")
def missing(ground: Ground) -> str:
    path = ground.stopped()
    (path / PIECES).unlink()
    return ground.said_by(lambda: load_all(path))


@fault(DAMAGED, "inspect --verify on two damaged places", "2 problems in … of tensor … of tensor …")
def verified(ground: Ground) -> str:
    path = ground.stopped()
    change(path / PIECES, flip(-100))
    change(path / PIECES, flip(-30_000))
    return ground.said_by(lambda: verify(path, Console(quiet=True)))


@fault(DAMAGED, "the newest checkpoint of a run is damaged", EXACT)
def goes_back(ground: Ground) -> str:
    change(ground.stopped() / PIECES, flip(-100))
    end = ground.resumes()
    assert "do not match their checksum" in (said := ground.captured())
    assert "going back to" in said
    return end


@fault(DAMAGED, "all checkpoints of a run are damaged", "do not match their checksum: they are damaged")
def all_damaged(ground: Ground) -> str:
    path = ground.stopped()
    for folder in path.parent.glob("step_*"):
        change(folder / PIECES, flip(-100))
    return ground.said_by(lambda: pretrain(ground.config(), None))


@fault(DAMAGED, "latest names a checkpoint that is gone", "latest = step_00000009 names a checkpoint that is not there")
def dangling_latest(ground: Ground) -> str:
    (ground.stopped().parent / "latest").write_text("step_00000009\n")
    return ground.said_by(lambda: pretrain(ground.config(), None))


@fault(DAMAGED, "a save that was killed is left beside the good ones", EXACT)
def unfinished(ground: Ground) -> str:
    path = ground.stopped()
    shutil.copytree(path, path.with_name("step_00000006.tmp"))
    (path.with_name("step_00000006.tmp") / "manifest.json").unlink()
    return ground.resumes()


@fault(DAMAGED, "an unfinished checkpoint is asked for", "step_00000006.tmp is a checkpoint that was not finished")
def unfinished_asked_for(ground: Ground) -> str:
    path = ground.stopped()
    shutil.copytree(path, path.with_name("step_00000006.tmp"))
    config = ground.config(checkpoint={"load": str(path.with_name("step_00000006.tmp"))})
    return ground.said_by(lambda: pretrain(config, None))


class _Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("was-run",)


@fault(MISLEADING, "a pickle that runs code", f"{PIECES}, bytes 0..… do not match the checksum of the header")
def crafted_pickle(ground: Ground) -> str:
    path = ground.stopped()
    crafted = pickle.dumps(_Bomb()).ljust((path / PIECES).stat().st_size, b"\0")
    (path / PIECES).write_bytes(crafted)
    (path / "state.json").with_name("state.pkl").write_bytes(crafted)
    said = ground.said_by(lambda: load_all(path))
    assert not Path("was-run").exists()
    return said


@fault(MISLEADING, "a pickle where a manifest should be", "manifest.json is not the JSON of a checkpoint's manifest")
def pickled_manifest(ground: Ground) -> str:
    path = ground.stopped()
    (path / "manifest.json").write_bytes(pickle.dumps(_Bomb()))
    said = ground.said_by(lambda: load_all(path))
    assert not Path("was-run").exists()
    return said


@fault(
    MISLEADING, "a safetensors header of 2⁶² bytes", f"{PIECES} has an impossible header of 4611686018427387904 bytes"
)
def huge_header(ground: Ground) -> str:
    path = ground.stopped()
    change(path / PIECES, lambda data: data.__setitem__(slice(0, 8), (1 << 62).to_bytes(8, "little")))
    rewrite(path, lambda manifest: manifest["files"][PIECES].update(header_bytes=1 << 62))
    return ground.said_by(lambda: load_all(path))


@fault(MISLEADING, "overlapping boxes", "tensor embed.weight has pieces that overlap")
def overlapping(ground: Ground) -> str:
    path = ground.stopped()
    rewrite(path, lambda m: m["tensors"]["embed.weight"]["pieces"].append(first_piece(m)))
    return ground.said_by(lambda: load_all(path))


@fault(MISLEADING, "two tensors at the same bytes", "of tensor … do not match their checksum")
def overlapping_offsets(ground: Ground) -> str:
    path = ground.stopped()
    rewrite(
        path, lambda m: first_piece(m).update(offset=m["tensors"]["layers.0.mlp.down.weight"]["pieces"][0]["offset"])
    )
    return ground.said_by(lambda: load_all(path))


@fault(MISLEADING, "a piece outside of its file", f"claims bytes … of {PIECES}, which has …")
def outside(ground: Ground) -> str:
    path = ground.stopped()
    rewrite(path, lambda m: first_piece(m).update(offset=1 << 40))
    return ground.said_by(lambda: load_all(path))


def _elsewhere(path: Path, name: str) -> None:
    def edit(manifest: dict[str, Any]) -> None:
        manifest["files"][name] = manifest["files"].pop(PIECES)
        for record in manifest["tensors"].values():
            for piece in record["pieces"]:
                piece["file"] = name

    rewrite(path, edit)


@fault(
    MISLEADING,
    "a path that leads out of the directory",
    "must be a plain *.safetensors name in the checkpoint's directory",
)
def escape(ground: Ground) -> str:
    path = ground.stopped()
    _elsewhere(path, "../secret.safetensors")
    return ground.said_by(lambda: load_all(path))


@fault(MISLEADING, "an absolute path", "file '/etc/passwd' must be a plain *.safetensors name")
def absolute(ground: Ground) -> str:
    path = ground.stopped()
    _elsewhere(path, "/etc/passwd")
    return ground.said_by(lambda: load_all(path))


@fault(
    MISLEADING, "a symbolic link out of the directory", f"{PIECES} cannot be opened: Too many levels of symbolic links"
)
def link(ground: Ground) -> str:
    path = ground.stopped()
    (path / PIECES).rename(ground.folder / PIECES)
    (path / PIECES).symlink_to(ground.folder / PIECES)
    return ground.said_by(lambda: load_all(path))


@fault(MISLEADING, "a pipe that would hang the reader", f"{PIECES} is not a regular file")
def pipe(ground: Ground) -> str:
    path = ground.stopped()
    (path / PIECES).unlink()
    os.mkfifo(path / PIECES)
    return ground.said_by(lambda: load_all(path))


@fault(MISLEADING, "a tensor of 2⁸⁰ elements", "tensor embed.weight has an impossible shape")
def huge_tensor(ground: Ground) -> str:
    path = ground.stopped()
    rewrite(path, lambda m: m["tensors"]["embed.weight"].update(shape=[1 << 40, 1 << 40]))
    return ground.said_by(lambda: load_all(path))


@fault(MISLEADING, "a manifest of 1 TB", "manifest.json has 1099511627776 bytes, more than the … it may have")
def huge_manifest(ground: Ground) -> str:
    path = ground.stopped()
    os.truncate(path / "manifest.json", 1 << 40)
    return ground.said_by(lambda: load_all(path))


@fault(
    MISLEADING,
    "a configuration with 10⁹ layers",
    "model.n_layers = 1000000000 is more than a checkpoint of … tensors can have",
)
def many_layers(ground: Ground) -> str:
    path = ground.stopped()
    state = json.loads((path / "state.json").read_text())
    state["config"]["model"]["n_layers"] = 10**9
    text = json.dumps(state).encode()
    (path / "state.json").write_bytes(text)
    blob = {"bytes": len(text), "xxh3": xxhash.xxh3_64_hexdigest(text)}
    rewrite(path, lambda manifest: manifest.update(state=blob))
    return ground.said_by(lambda: Reader(path).config())
