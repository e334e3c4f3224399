"""Types of the compiled extension; csrc/host/bpe.cpp is its source."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

class PieceCounter:
    """Counts distinct pre-tokens, and trains on the counts."""

    n_pieces: int
    n_distinct: int
    def __init__(self) -> None: ...
    def add(self, text: bytes, ends: NDArray[np.int64]) -> None: ...
    def train(
        self, byte_order: bytes, n_tokens: int, progress: Callable[[int], None]
    ) -> tuple[list[bytes], NDArray[np.int32]]: ...

class Encoder:
    """Encodes pre-tokens by ranked merges."""

    def __init__(self, tokens: Sequence[bytes], merges: NDArray[np.int32], whole_first: bool) -> None: ...
    def encode(
        self, text: bytes, ends: NDArray[np.int64], document_ends: NDArray[np.int64], threads: int
    ) -> tuple[NDArray[np.int32], NDArray[np.int64]]: ...

class CharacterEncoder:
    """Encodes text as SentencePiece's BPE with byte fallback does."""

    def __init__(
        self,
        tokens: Sequence[bytes],
        merges: NDArray[np.int32],
        byte_ids: Sequence[int],
        frozen: Sequence[int],
        cut_spaces: bool,
    ) -> None: ...
    def encode(
        self, text: bytes, ends: NDArray[np.int64], document_ends: NDArray[np.int64], threads: int
    ) -> tuple[NDArray[np.int32], NDArray[np.int64]]: ...
