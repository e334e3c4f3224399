"""Files that appear whole or not at all: written under a temporary name, flushed to disk, renamed."""

import os
import secrets
from io import BufferedWriter
from pathlib import Path


def temporary_name(path: Path) -> Path:
    """Return a name beside `path` that no other process uses: process ids repeat across the nodes of a cluster."""
    return path.with_name(f"{path.name}.{secrets.token_hex(6)}.tmp")


def sync(file: BufferedWriter) -> None:
    """Flush a file to the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_directory(directory: Path) -> None:
    """Flush the names in a directory, so that renames in it survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
