"""Types of the compiled extension; csrc/host/bpe.cpp is its source."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Buffer = bytes | memoryview | NDArray[np.uint8]

UNICODE_VERSION: str

def scan(scanner: str, text: Buffer) -> NDArray[np.int64]:
    """Return the byte offset at which each pre-token of one text ends."""

def character_classes() -> bytes:
    """Return the class bits of every code point: letter 1, number 2, space 4, newline 8, upper 16, lower 32."""

class PieceCounter:
    """Counts distinct pre-tokens, and trains on the counts."""

    n_distinct: int
    def __init__(self) -> None: ...
    def add(self, scanner: str, text: Buffer, ends: NDArray[np.int64], threads: int) -> None: ...
    def train(
        self, byte_order: bytes, n_tokens: int, progress: Callable[[int], None]
    ) -> tuple[list[bytes], NDArray[np.int32]]: ...

class Encoder:
    """Encodes documents, or pre-tokens, by ranked merges."""

    linear: bool
    def __init__(self, tokens: Sequence[bytes], merges: NDArray[np.int32], whole_first: bool) -> None: ...
    def encode_documents(
        self, scanner: str, text: Buffer, ends: NDArray[np.int64], threads: int
    ) -> tuple[NDArray[np.uint32], NDArray[np.int64]]: ...
    def encode_documents_16(
        self, scanner: str, text: Buffer, ends: NDArray[np.int64], threads: int
    ) -> tuple[NDArray[np.uint16], NDArray[np.int64]]: ...
    def encode(
        self, text: Buffer, ends: NDArray[np.int64], document_ends: NDArray[np.int64], threads: int
    ) -> tuple[NDArray[np.uint32], NDArray[np.int64]]: ...

class Decoder:
    """Decodes ids to bytes."""

    def __init__(self, tokens: Sequence[bytes]) -> None: ...
    def decode(self, ids: NDArray[np.integer]) -> bytes:
        """Raises: IndexError: for an id outside the vocabulary, which is its message."""
