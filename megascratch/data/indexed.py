"""The indexed dataset: token sequences in one flat file, found through an index.

Byte-compatible with Megatron's `MMapIndexedDataset`, in both directions. A dataset at prefix `p` is two little-endian
files. Two documents, [[5 6 7]] and [[8] [9 9]], as uint16:

    p.bin   05 00 06 00 07 00 08 00 09 00 09 00
    p.idx   "MMIDIDX\\0\\0", version 1 (uint64), dtype code 8 (uint8), 3 sequences (uint64), 3 document marks (uint64),
            lengths         int32  [3, 1, 2]    tokens in each sequence
            pointers        int64  [0, 6, 8]    where each sequence starts in p.bin, in bytes
            document marks  int64  [0, 1, 3]    document i is sequences marks[i] to marks[i + 1]
            modes           int8   [0, 0, 0]    optional: Megatron's modality of each sequence

A corpus from `preprocess` has one sequence a document, except that an empty document has none.
"""

import struct
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from megascratch.errors import DataError, Problem

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document marks: 34 bytes, unpadded
DTYPES: dict[int, np.dtype] = {
    1: np.dtype("uint8"),
    2: np.dtype("int8"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    6: np.dtype("<f8"),
    7: np.dtype("<f4"),
    8: np.dtype("<u2"),
}
LENGTH_DTYPE = np.dtype("<i4")
POINTER_DTYPE = np.dtype("<i8")
MARK_DTYPE = np.dtype("<i8")
MODE_DTYPE = np.dtype("int8")

_SCAN_SEQUENCES = 1 << 22  # sequences checked at a time: 50 MB of index


def bin_path(prefix: Path | str) -> Path:
    """Return the file of tokens of the dataset at `prefix`."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: Path | str) -> Path:
    """Return the index file of the dataset at `prefix`."""
    return Path(f"{prefix}.idx")


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the smallest dtype that Megatron uses for a vocabulary: uint16 below 65,500 ids, else int32."""
    return DTYPES[8] if vocab_size < 65500 else DTYPES[4]


def dtype_code(dtype: np.dtype) -> int:
    """Return the code of a dtype in the index header."""
    return next(code for code, known in DTYPES.items() if known == dtype)


class IndexedDataset:
    """A dataset on disk, checked when it is opened, memory-mapped and read-only.

    Args:
        prefix: path of the dataset without `.bin` or `.idx`.

    Attributes:
        dtype: of the tokens.
        lengths: tokens in each sequence, [n_sequences] int32.
        pointers: byte offset of each sequence in the `.bin`, [n_sequences] int64.
        document_marks: document i is sequences marks[i] to marks[i + 1], [n_documents + 1] int64.
        modes: modality of each sequence, [n_sequences] int8, or None.
        n_tokens: sum of the lengths.
        contiguous: whether the sequences follow each other from byte 0, as every writer leaves them.

    Raises: DataError: if a file is missing or truncated, the header is not Megatron's, or the index contradicts itself
        or the `.bin`.
    """

    def __init__(self, prefix: Path | str) -> None:
        self.prefix = Path(prefix)
        self.bin_path, self.idx_path = bin_path(prefix), idx_path(prefix)
        _require_both_files(self.prefix)
        self.dtype, n_sequences, n_marks, has_modes = _read_header(self.idx_path)

        index = np.asarray(np.memmap(self.idx_path, dtype=np.uint8, mode="r"))
        start = HEADER.size
        sections: list[NDArray] = []
        for count, dtype in ((n_sequences, LENGTH_DTYPE), (n_sequences, POINTER_DTYPE), (n_marks, MARK_DTYPE)):
            sections.append(index[start : start + count * dtype.itemsize].view(dtype))
            start += count * dtype.itemsize
        self.lengths: NDArray[np.int32] = sections[0]
        self.pointers: NDArray[np.int64] = sections[1]
        self.document_marks: NDArray[np.int64] = sections[2]
        self.modes: NDArray[np.int8] | None = index[start:].view(MODE_DTYPE) if has_modes else None

        self.bin_bytes = self.bin_path.stat().st_size
        self._check_document_marks()
        self.n_tokens, self.contiguous = self._check_pointers()
        # An empty file can't be mapped.
        self._bytes = (
            np.asarray(np.memmap(self.bin_path, dtype=np.uint8, mode="r")) if self.bin_bytes else np.empty(0, np.uint8)
        )

    def __len__(self) -> int:
        """Return the number of sequences."""
        return len(self.lengths)

    @property
    def n_documents(self) -> int:
        """Number of documents, empty ones included."""
        return len(self.document_marks) - 1

    def __getitem__(self, sequence: int) -> NDArray:
        """Return the tokens of a sequence, [lengths[sequence]], a view of the file."""
        return self.get(sequence)

    def get(self, sequence: int, offset: int = 0, length: int | None = None) -> NDArray:
        """Return `length` tokens of a sequence from token `offset` on (to its end when None), a view of the file."""
        n_left = int(self.lengths[sequence]) - offset
        length = n_left if length is None else length
        assert offset >= 0 and 0 <= length <= n_left, f"tokens {offset}+{length} of sequence {sequence}"
        start = int(self.pointers[sequence]) + offset * self.dtype.itemsize
        return self._bytes[start : start + length * self.dtype.itemsize].view(self.dtype)

    def document(self, document: int) -> NDArray:
        """Return the tokens of all sequences of a document, [document length]."""
        first, stop = int(self.document_marks[document]), int(self.document_marks[document + 1])
        return np.concatenate([np.empty(0, self.dtype), *(self.get(sequence) for sequence in range(first, stop))])

    def token_blocks(self, block_tokens: int) -> Iterator[NDArray]:
        """Yield all tokens in the order of the sequences, as views of the file of at most `block_tokens` where the
        sequences are contiguous, and a sequence at a time where they are not."""
        if self.contiguous:
            flat = self._bytes[: self.n_tokens * self.dtype.itemsize].view(self.dtype)
            yield from (flat[start : start + block_tokens] for start in range(0, self.n_tokens, block_tokens))
        else:
            yield from (self.get(sequence) for sequence in range(len(self)))

    @cached_property
    def lengths_digest(self) -> str:
        """Checksum of the lengths: sample indices that were built for it stay valid while it stays the same."""
        digest = xxhash.xxh3_128()
        for start in range(0, len(self), _SCAN_SEQUENCES):
            digest.update(self.lengths[start : start + _SCAN_SEQUENCES].tobytes())
        return digest.hexdigest()

    def __reduce__(self) -> tuple[type["IndexedDataset"], tuple[Path]]:
        # Other processes map the files again; the default would copy the whole corpus through a pipe.
        return type(self), (self.prefix,)

    def _check_document_marks(self) -> None:
        marks, n_sequences = self.document_marks, len(self)
        if len(marks) == 0 or marks[0] != 0 or marks[-1] != n_sequences or bool(np.any(np.diff(marks) < 0)):
            shown = "none" if len(marks) == 0 else f"{marks[0]} to {marks[-1]}"
            raise DataError(
                Problem(
                    f"document marks: {shown}",
                    f"must rise from 0 to the number of sequences, {n_sequences}",
                    "the index is damaged: copy it again, or preprocess again",
                ),
                str(self.idx_path),
            )

    def _check_pointers(self) -> tuple[int, bool]:
        n_tokens, contiguous = 0, True
        itemsize = self.dtype.itemsize
        for start in range(0, len(self), _SCAN_SEQUENCES):
            lengths = self.lengths[start : start + _SCAN_SEQUENCES].astype(np.int64)
            pointers = self.pointers[start : start + _SCAN_SEQUENCES]
            ends = pointers + lengths * itemsize  # cannot wrap where the pointer lies inside the file
            outside = (lengths < 0) | (pointers < 0) | (pointers > self.bin_bytes) | (ends > self.bin_bytes)
            if outside.any():
                self._refuse_sequence(start + int(outside.argmax()))
            expected = n_tokens * itemsize + np.concatenate([[0], np.cumsum(lengths[:-1]) * itemsize])
            contiguous = contiguous and bool(np.array_equal(pointers, expected))
            n_tokens += int(lengths.sum())
        return n_tokens, contiguous

    def _refuse_sequence(self, sequence: int) -> None:
        length, pointer = int(self.lengths[sequence]), int(self.pointers[sequence])
        raise DataError(
            Problem(
                f"{self.bin_path.name} has {self.bin_bytes:,} bytes",
                f"sequence {sequence} of {len(self)} has {length:,} tokens of {self.dtype} at byte {pointer:,}",
                "the .bin is truncated or belongs to another .idx: copy both again, or preprocess again",
            ),
            str(self.prefix),
        )


def _require_both_files(prefix: Path) -> None:
    missing = [path for path in (bin_path(prefix), idx_path(prefix)) if not path.is_file()]
    if not missing:
        return
    if prefix.suffix in (".bin", ".idx"):
        remedy = f"give the prefix without {prefix.suffix}: {prefix.with_suffix('')}"
    elif len(missing) == 1:
        remedy = "a dataset is a .bin and an .idx: copy the other one too, or preprocess again"
    else:
        remedy = "give the path without .bin and .idx; preprocess names it <output-prefix>_<key>_document"
    raise DataError([Problem(str(path), "no such file", remedy) for path in missing], f"dataset {prefix}")


def _read_header(path: Path) -> tuple[np.dtype, int, int, bool]:
    """Return (token dtype, sequences, document marks, whether modes follow), all consistent with the file's size."""
    size = path.stat().st_size
    with path.open("rb") as file:
        header = file.read(HEADER.size)
    preprocess_again = "copy the file again, or preprocess again"
    if header[: len(MAGIC)] != MAGIC:
        raise DataError(
            Problem(
                f"starts with {header[: len(MAGIC)]!r}",
                f"an index starts with {MAGIC!r}",
                "only Megatron's memory-mapped format is read: preprocess the text again",
            ),
            str(path),
        )
    if len(header) < HEADER.size:
        problem = Problem(f"{size} bytes", f"the header alone has {HEADER.size}", f"truncated: {preprocess_again}")
        raise DataError(problem, str(path))
    _, version, code, n_sequences, n_marks = HEADER.unpack(header)
    if version != VERSION:
        raise DataError(Problem(f"version {version}", f"must be {VERSION}", preprocess_again), str(path))
    if code not in DTYPES:
        known = ", ".join(f"{known} ({dtype.name})" for known, dtype in DTYPES.items())
        raise DataError(Problem(f"dtype code {code}", f"must be one of {known}", preprocess_again), str(path))
    body = n_sequences * (LENGTH_DTYPE.itemsize + POINTER_DTYPE.itemsize) + n_marks * MARK_DTYPE.itemsize
    sizes = (HEADER.size + body, HEADER.size + body + n_sequences * MODE_DTYPE.itemsize)
    if size not in sizes:
        raise DataError(
            Problem(
                f"{size:,} bytes",
                f"{n_sequences:,} sequences and {n_marks:,} marks take {sizes[0]:,}, or {sizes[1]:,} with modes",
                f"truncated or damaged: {preprocess_again}",
            ),
            str(path),
        )
    return DTYPES[code], n_sequences, n_marks, n_sequences > 0 and size == sizes[1]
