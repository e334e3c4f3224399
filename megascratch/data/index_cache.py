"""Index arrays built once and memory-mapped ever after, by every rank, without communication.

An entry is keyed by a readable description of all that the arrays depend on, so equal keys mean equal bytes. Of many
ranks that start at once, on one node or many, the first to lock the description builds, and the others wait for it.
Where the file system has no locks all may build: each writes under names of its own and renames, whoever is last wins,
and the readers of an earlier file keep it open.

    <cache_dir>/7c3e….json                   the description, for people, and the lock
    <cache_dir>/7c3e…-sample_index.npy       an array
"""

import fcntl
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TextIO

import numpy as np
import xxhash
from numpy.typing import NDArray

from megascratch.data.atomic import sync, temporary_name
from megascratch.errors import DataError, Problem


def load_or_build(
    cache_dir: Path, description: Mapping[str, object], names: Sequence[str], build: Callable[[], Mapping[str, NDArray]]
) -> dict[str, NDArray]:
    """Return the arrays of a description, read-only and memory-mapped, building them first where they are missing.

    Args:
        cache_dir: made when missing.
        description: everything that the arrays depend on, as JSON values.
        names: of the arrays.
        build: makes them; must be a pure function of the description.

    Raises: DataError: if the directory can't be written, or a cached file is damaged.
    """
    text = json.dumps(description, indent=2)
    key = xxhash.xxh3_128_hexdigest(text.encode())
    paths = {name: cache_dir / f"{key}-{name}.npy" for name in names}
    if not _all_exist(paths.values()):
        try:
            cache_dir.mkdir(parents=True, exist_ok=True)
            with (cache_dir / f"{key}.json").open("a") as entry:
                _lock(entry)
                if not _all_exist(paths.values()):
                    arrays = build()
                    for name, path in paths.items():
                        _write(path, arrays[name])
                    entry.truncate(0)
                    entry.write(text + "\n")
        except OSError as error:
            problem = Problem(str(cache_dir), f"cannot be written: {error.strerror}", "set data.cache_dir")
            raise DataError(problem, "the cache of sample indices") from error
    return {name: _read(path) for name, path in paths.items()}


def _all_exist(paths: Iterable[Path]) -> bool:
    return all(path.exists() for path in paths)


def _lock(entry: TextIO) -> None:
    """Wait until no other process builds the entry; closing it lets the next one in."""
    with suppress(OSError):  # a file system without locks
        fcntl.flock(entry, fcntl.LOCK_EX)


def _write(path: Path, values: NDArray) -> None:
    temporary = temporary_name(path)
    try:
        with temporary.open("xb") as file:
            np.save(file, values, allow_pickle=False)
            sync(file)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _read(path: Path) -> NDArray:
    try:
        values: NDArray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        problem = Problem(path.name, f"is damaged: {error}", "delete the file; it will be built again")
        raise DataError(problem, str(path)) from error
    return values
