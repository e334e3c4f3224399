#!/usr/bin/env python3
"""Damage a small checkpoint in random ways, and see that loading it always says so.

    python tools/mutate_checkpoint.py --count 10000 --seed 1

Flips of one bit, truncations, holes of zeros, pieces swapped within and between files, files of another step, stale
manifests. Every one must end in an error of ours; one that loads is printed, with its number, and the exit code is 1.
"""

import argparse
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from megascratch.checkpoint import Reader, Shard, save
from megascratch.checkpoint.load import tensor_shard
from megascratch.dist.layout import Extent
from megascratch.dist.mesh import Axis
from megascratch.errors import CheckpointError

Mutation = Callable[[Path, Path, random.Random], str]


def write(root: Path, step: int) -> Path:
    """Write a checkpoint of two ranks' files; values depend on the step."""
    values = torch.Generator().manual_seed(step)

    def half(name: str, rows: int, columns: int, rank: int) -> Shard:
        tensor = torch.randn(rows // 2, columns, generator=values)
        first = rank * rows // 2
        logical = (slice(first, first + rows // 2), slice(0, columns))
        return Shard(name, (rows, columns), tensor, [Extent((slice(0, rows // 2), slice(0, columns)), logical)])

    shards = [half(name, 8, 16, rank) for rank in range(2) for name in ("a.weight", "optim/exp_avg/a.weight")]
    return save(root, step, shards, {"consumed_samples": 8 * step}, Axis("world"))


def load_all(path: Path) -> dict[str, Tensor]:
    """Read the state and every tensor."""
    reader = Reader(path)
    reader.state()
    shards = [
        tensor_shard(name, record, tuple(slice(0, n) for n in record.shape), torch.float32)
        for name, record in reader.manifest.tensors.items()
    ]
    reader.fill(shards)
    return {shard.name: shard.tensor for shard in shards}


def flip(path: Path, _: Path, draw: random.Random) -> str:
    file = draw.choice(sorted(path.iterdir()))
    data = bytearray(file.read_bytes())
    offset, bit = draw.randrange(len(data)), draw.randrange(8)
    data[offset] ^= 1 << bit
    file.write_bytes(data)
    return f"bit {bit} of byte {offset} of {file.name}"


def truncate(path: Path, _: Path, draw: random.Random) -> str:
    file = draw.choice(sorted(path.iterdir()))
    data = file.read_bytes()
    length = draw.randrange(len(data))
    file.write_bytes(data[:length])
    return f"{file.name} cut to {length} bytes"


def hole(path: Path, _: Path, draw: random.Random) -> str:
    file = draw.choice(sorted(path.iterdir()))
    data = bytearray(file.read_bytes())
    start = draw.randrange(len(data) - 1)
    stop = draw.randrange(start + 1, len(data))
    if not any(data[start:stop]):
        data[start] = 1  # zeros are there already
    else:
        data[start:stop] = bytes(stop - start)
    file.write_bytes(data)
    return f"bytes {start} to {stop} of {file.name} emptied"


def swap(path: Path, _: Path, draw: random.Random) -> str:
    pieces = [piece for record in Reader(path).manifest.tensors.values() for piece in record.pieces]
    one, two = draw.sample(pieces, 2)
    data = {piece.file: bytearray((path / piece.file).read_bytes()) for piece in (one, two)}
    first, second = (bytes(data[p.file][p.offset : p.offset + p.bytes]) for p in (one, two))
    data[one.file][one.offset : one.offset + one.bytes] = second
    data[two.file][two.offset : two.offset + two.bytes] = first
    for name, content in data.items():
        (path / name).write_bytes(content)
    return f"pieces {one.box} and {two.box} swapped"


def mix(path: Path, other: Path, draw: random.Random) -> str:
    """Put some, but not all, files of another step in place."""
    names = sorted(file.name for file in path.iterdir())
    taken = draw.sample(names, draw.randrange(1, len(names)))
    for name in taken:
        shutil.copy(other / name, path / name)
    return f"{', '.join(taken)} of another step"


def shuffle_bytes(path: Path, _: Path, draw: random.Random) -> str:
    file = draw.choice(sorted(path.iterdir()))
    data = bytearray(file.read_bytes())
    start = draw.randrange(len(data) - 16)
    before = bytes(data[start : start + 16])
    while bytes(data[start : start + 16]) == before:
        data[start : start + 16] = draw.randbytes(16)
    file.write_bytes(data)
    return f"16 random bytes at {start} of {file.name}"


MUTATIONS: tuple[Mutation, ...] = (flip, flip, truncate, hole, swap, mix, shuffle_bytes)


def silent(count: int, seed: int) -> list[str]:
    """Return the mutations, of `count` random ones, that a load did not notice."""
    draw, missed = random.Random(seed), []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        good, other = write(root / "run", 1), write(root / "run", 2)
        load_all(good)
        for number in range(count):
            path = root / "mutant"
            shutil.copytree(good, path)
            what = draw.choice(MUTATIONS)(path, other, draw)
            try:
                load_all(path)
                missed.append(f"{number}: {what}")
            except CheckpointError:
                pass
            shutil.rmtree(path)
    return missed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    missed = silent(arguments.count, arguments.seed)
    print("\n".join([*missed, f"{len(missed)} of {arguments.count} mutations were silent"]))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
