"""Where checkpoints lie: a path of this machine, or a URL that fsspec opens (`s3://`, `gs://`, `memory://`).

A URL becomes a `UPath`, which has the methods of `Path`, so code that only walks, reads and writes need not know. What
does differ stands here:

                         path                          URL
    read at an offset    pread                         a range request
    a file is safe       after fsync                   once it is closed
    a directory          is renamed when it is whole   there is none: a checkpoint is whole once its manifest is there
"""

import os
import shutil
import stat
from pathlib import Path
from typing import BinaryIO, cast

from megascratch.errors import ConfigError, MissingDependency, Problem


def place(text: str) -> Path:
    """Return the path or URL that a recipe names.

    Raises:
        MissingDependency: if it is a URL, and what opens it is not installed.
        ConfigError: if its scheme is not known.
    """
    if "://" not in text:
        return Path(text)
    try:
        from upath import UPath
    except ImportError:
        problem = Problem(text, "needs universal-pathlib, which is not installed", "pip install 'megascratch[remote]'")
        raise MissingDependency(problem) from None
    try:
        found = UPath(text)
        _ = found.fs  # opens the file system, which imports what the scheme needs
    except ImportError as error:
        raise MissingDependency(Problem(text, f"cannot be opened: {error}", "install what it names")) from None
    except ValueError as error:
        raise ConfigError(Problem(text, f"is not a URL that can be opened: {error}", "correct its scheme")) from None
    return cast(Path, found)


def is_local(path: Path) -> bool:
    """Return whether a path is one of this machine, and not a URL."""
    return isinstance(path, Path)


class SourceFile:
    """A file that is read at offsets.

    Attributes:
        size: in bytes, when it was opened.
        is_regular: False for what could lead elsewhere or hang: a device, a pipe, a folder.

    Raises: OSError: if it cannot be opened, or is a link.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = -1
        self._file: BinaryIO | None = None
        if not is_local(path):
            self._file = path.open("rb")
            self.size, self.is_regular = path.stat().st_size, True
            return
        self._descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        status = os.fstat(self._descriptor)
        self.size, self.is_regular = status.st_size, stat.S_ISREG(status.st_mode)

    def read_into(self, buffer: memoryview, offset: int) -> int:
        """Fill a buffer from the bytes at `offset`; returns how many there were."""
        done = 0
        while done < len(buffer):
            if self._file is not None:
                self._file.seek(offset + done)
                count = self._file.readinto(buffer[done:])  # type: ignore[attr-defined]
            else:
                count = os.preadv(self._descriptor, [buffer[done:]], offset + done)
            if count == 0:
                break
            done += count
        return done

    def read(self, n_bytes: int) -> bytes:
        """Return the first bytes of the file."""
        data = bytearray(n_bytes)
        return bytes(data[: self.read_into(memoryview(data), 0)])

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        else:
            os.close(self._descriptor)


def create(path: Path, *, over: bool = False) -> BinaryIO:
    """Open a new file for writing; `flush` it before it is closed.

    Args:
        path: must not exist, but behind a URL.
        over: take a file that is there for its space: on a RAM disk, taking pages anew costs more than filling them.
    """
    if not is_local(path):
        return path.open("wb")
    if over and os.path.lexists(path):
        if (descriptor := _opened_over(path)) is not None:
            return os.fdopen(descriptor, "r+b")
        path.unlink()
    return path.open("xb")


def _opened_over(path: Path) -> int | None:
    """Open a file to write over it, if nobody else can be meant to have it: no link, no second name, no other owner."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode) and status.st_nlink == 1 and status.st_uid == os.geteuid():
        return descriptor
    os.close(descriptor)
    return None


def start_flush(file: BinaryIO, path: Path, offset: int, n_bytes: int) -> None:
    """Have bytes that were written begin their way to the disk, so that `flush` finds little left to wait for."""
    if is_local(path):
        # Linux starts to write dirty pages out when it is told that they are not needed in memory.
        os.posix_fadvise(file.fileno(), offset, n_bytes, os.POSIX_FADV_DONTNEED)


def flush(file: BinaryIO, path: Path) -> None:
    """End the file here, and have all that was written reach the disk."""
    if is_local(path):
        file.truncate()
        file.flush()
        os.fsync(file.fileno())


def write_flushed(path: Path, data: bytes) -> None:
    """Write a new file, and have it reach the disk."""
    with create(path) as file:
        file.write(data)
        flush(file, path)


def replace_text(path: Path, text: str) -> None:
    """Give a small file another content at once: whoever reads it sees the old one or the new one."""
    if not is_local(path):
        path.write_text(text)
        return
    fresh = path.with_name(path.name + ".tmp")
    fresh.unlink(missing_ok=True)
    write_flushed(fresh, text.encode())
    fresh.replace(path)
    flush_directory(path.parent)


def flush_directory(path: Path) -> None:
    """Have a directory's names reach the disk."""
    if not is_local(path):
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_tree(path: Path) -> None:
    """Delete a directory with all that is in it; nothing happens where there is none."""
    if is_local(path):
        shutil.rmtree(path, ignore_errors=True)
    elif path.exists():
        path.fs.rm(path.path, recursive=True)  # type: ignore[attr-defined]
