"""What a checkpoint holds, and whether all of it can be read."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from megascratch.checkpoint.format import OPTIMIZER, Piece, TensorRecord
from megascratch.checkpoint.load import Reader, find
from megascratch.errors import CheckpointError, Problem
from megascratch.log import progress

_SHOWN_PROBLEMS = 20


@dataclass(frozen=True)
class Description:
    """A checkpoint in plain words.

    Attributes:
        path: its directory.
        step: training steps done.
        consumed_samples: samples read so far.
        n_parameters: logical parameters; a tied tensor counts once, padding and optimizer state not at all.
        tensors: every logical tensor, optimizer state included, by name.
        bytes: of all pieces.
        n_files: files that hold them.
        layout: sizes of the mesh that saved it, as its configuration says; empty where there is none.
        config: the resolved configuration.
    """

    path: Path
    step: int
    consumed_samples: int
    n_parameters: int
    tensors: Mapping[str, TensorRecord]
    bytes: int
    n_files: int
    layout: Mapping[str, int]
    config: Mapping[str, Any]


def describe(path: Path) -> Description:
    """Read what a checkpoint says about itself, without its tensors.

    Raises: CheckpointError: if there is none, or its manifest or state is damaged.
    """
    reader = Reader(find(path))
    manifest, state = reader.manifest, reader.state()
    config = state.get("config")
    config = config if isinstance(config, dict) else {}
    parallel = config.get("parallel")
    parallel = parallel if isinstance(parallel, dict) else {}
    consumed = state.get("consumed_samples")
    return Description(
        path=reader.directory,
        step=manifest.step,
        consumed_samples=consumed if isinstance(consumed, int) else 0,
        n_parameters=sum(r.numel for name, r in manifest.tensors.items() if not name.startswith(OPTIMIZER)),
        tensors=manifest.tensors,
        bytes=sum(record.bytes for record in manifest.tensors.values()),
        n_files=len(manifest.files),
        layout={axis: n for axis in ("pp", "dp", "cp", "tp") if isinstance(n := parallel.get(axis), int)},
        config=config,
    )


def verify(path: Path, console: Console) -> None:
    """Read everything and compare it with its checksums: state, headers and pieces.

    Raises: CheckpointError: with every damaged place, up to 20 of them.
    """
    reader = Reader(find(path))
    reader.state()
    by_file: dict[str, list[tuple[Piece, str]]] = {file: [] for file in reader.manifest.files}
    for name, record in reader.manifest.tensors.items():
        for piece in record.pieces:
            by_file[piece.file].append((piece, name))
    problems: list[Problem] = []
    total = sum(record.bytes for record in reader.manifest.tensors.values())
    with progress(console, f"verifying {reader.directory.name}", total, "B") as advance:
        for file, pieces in by_file.items():
            try:
                with reader.open(file) as opened:
                    for piece, name in sorted(pieces, key=lambda pair: pair[0].offset):
                        for index in range(len(piece.xxh3)):
                            try:
                                reader.read_chunk(opened, name, piece, index)
                            except CheckpointError as error:
                                problems += error.problems
                        advance(piece.bytes)
            except CheckpointError as error:
                problems += error.problems
    if problems:
        raise CheckpointError(problems[:_SHOWN_PROBLEMS], str(reader.directory))
