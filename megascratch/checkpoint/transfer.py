"""A checkpoint's directory sent from one rank to another, byte for byte, and put in its place there as `save` would.

    {"step": "step_00000040", "files": {"manifest.json": 812, "rank_00002.safetensors": 20971520, "state.json": 300}}
    812 bytes │ 16 MiB │ 4 MiB │ 300 bytes

The bytes go through host memory, over the backend that ranks have for it beside NCCL. Checksums travel along in the
manifest: whoever loads the copy verifies it.
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, suppress
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import torch
from torch import Tensor

from megascratch.checkpoint.format import open_regular
from megascratch.checkpoint.places import SourceFile, create, flush, flush_directory
from megascratch.checkpoint.retention import STEP_NAME, prune
from megascratch.checkpoint.save import begin_directory, end_directory
from megascratch.dist import comm
from megascratch.dist.mesh import Axis
from megascratch.errors import CheckpointError, Problem

_PART_BYTES = 16 << 20
_LARGEST_HEADER_BYTES = 1 << 20
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")
_TAG = 0


def send_directory(path: Path | None, axis: Axis, peer: int) -> None:
    """Send a complete checkpoint to the rank at coordinate `peer`, which calls `receive_directory`; None sends nothing.

    Raises: CheckpointError: if its files cannot be opened; the peer is told that nothing comes.
    """
    with ExitStack() as opened:
        sources: dict[str, SourceFile] = {}
        try:
            for file in sorted(path.iterdir()) if path is not None else ():
                sources[file.name] = opened.enter_context(closing(open_regular(file)))
        except CheckpointError:
            _send_header("", {}, axis, peer)
            raise
        _send_header(path.name if path is not None else "", sources, axis, peer)
        buffer = torch.empty(_PART_BYTES, dtype=torch.uint8)
        for source in sources.values():
            for offset in range(0, source.size, _PART_BYTES):
                part = buffer[: source.size - offset]
                with suppress(OSError):  # what could not be read will not match its checksum
                    source.read_into(part.numpy().data, offset)
                comm.isend(part, axis, peer, _TAG).wait()


def receive_directory(root: Path, axis: Axis, peer: int, keep: int) -> None:
    """Receive what the rank at coordinate `peer` sends as `root/step_…`; of what was there, the `keep` newest stay.

    Raises: CheckpointError: if it cannot be written; all that is sent is taken nevertheless, so that the peer goes on.
    """
    header = json.loads(_receive_header(axis, peer))
    name, sizes = header["step"], header["files"]
    if not sizes:
        return
    assert STEP_NAME.fullmatch(name) is not None, "the peer sends something else"
    assert all(_FILE_NAME.fullmatch(file) for file in sizes), "the peer sends something else"
    incoming = _parts(sizes, axis, peer)
    try:
        folder = begin_directory(root / name, recycle=True)
        for file, parts in groupby(incoming, key=itemgetter(0)):
            with create(folder / file, over=True) as target:
                for _, part in parts:
                    target.write(part.numpy().data)
                flush(target, folder / file)
        for file in folder.iterdir():
            if file.name not in sizes:
                file.unlink()
        flush_directory(folder)
        prune(root, keep, end_directory(folder, root / name), recycle=True)
    except OSError as error:
        problem = Problem(f"{root / name}", f"cannot be written: {error.strerror or error}", "make room")
        raise CheckpointError(problem) from None
    finally:
        for _ in incoming:
            pass


def _send_header(name: str, sources: Mapping[str, SourceFile], axis: Axis, peer: int) -> None:
    sizes = {file: source.size for file, source in sources.items()}
    text = json.dumps({"step": name, "files": sizes}).encode()
    comm.isend(torch.tensor([len(text)]), axis, peer, _TAG).wait()
    comm.isend(torch.frombuffer(bytearray(text), dtype=torch.uint8), axis, peer, _TAG).wait()


def _receive_header(axis: Axis, peer: int) -> bytes:
    length = torch.zeros(1, dtype=torch.int64)
    comm.irecv(length, axis, peer, _TAG).wait()
    assert 0 < length <= _LARGEST_HEADER_BYTES, "the peer sends something else"
    text = torch.empty(int(length), dtype=torch.uint8)
    comm.irecv(text, axis, peer, _TAG).wait()
    return text.numpy().tobytes()


def _parts(sizes: Mapping[str, int], axis: Axis, peer: int) -> Iterator[tuple[str, Tensor]]:
    """Yield the parts of each file, valid until the next one comes."""
    buffer = torch.empty(_PART_BYTES, dtype=torch.uint8)
    for file, size in sizes.items():
        for offset in range(0, size, _PART_BYTES):
            part = buffer[: size - offset]
            comm.irecv(part, axis, peer, _TAG).wait()
            yield file, part
