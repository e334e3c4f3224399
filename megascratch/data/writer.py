"""Writing an indexed dataset: whole under its final name, or not there at all.

Tokens stream into `<prefix>.bin.<random>.tmp`; lengths and document marks stay in memory (12 bytes a document). When
the writer is left without an error, both files are flushed to disk and renamed, the index last: a dataset without
its `.idx` does not open, so no reader ever sees half of one.
"""

from array import array
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megascratch.data.atomic import sync, sync_directory, temporary_name
from megascratch.data.indexed import (
    HEADER,
    LENGTH_DTYPE,
    MAGIC,
    MARK_DTYPE,
    MODE_DTYPE,
    POINTER_DTYPE,
    VERSION,
    IndexedDataset,
    bin_path,
    dtype_code,
    idx_path,
)
from megascratch.errors import DataError, Problem

_COPY_TOKENS = 8 << 20


def require_free(prefix: Path | str, overwrite: bool) -> None:
    """Refuse a prefix that is taken, or whose directory is missing.

    Raises: DataError: if a file of the dataset exists and `overwrite` is not asked, or there is no such directory.
    """
    problems = []
    if not bin_path(prefix).parent.is_dir():
        problems.append(Problem(str(bin_path(prefix).parent), "no such directory", "create it, or choose another"))
    for path in (bin_path(prefix), idx_path(prefix)):
        if path.exists() and not overwrite:
            problems.append(Problem(str(path), "exists already", "choose another prefix, or ask to overwrite"))
    if problems:
        raise DataError(problems, f"output {prefix}")


class IndexedDatasetWriter:
    """Write a dataset; a context manager, and only leaving it without an error makes the files appear.

    Args:
        prefix: path of the dataset without `.bin` or `.idx`.
        dtype: of the tokens; see `token_dtype`.
        with_modes: also store a modality for each sequence.
        overwrite: replace a dataset that exists at the prefix.

    Raises: DataError: if the prefix is taken and `overwrite` is not asked.
    """

    def __init__(
        self, prefix: Path | str, dtype: np.dtype, *, with_modes: bool = False, overwrite: bool = False
    ) -> None:
        require_free(prefix, overwrite)
        self.prefix = Path(prefix)
        self.dtype = np.dtype(dtype)
        self.overwrite = overwrite
        self._lengths = array("i")
        self._marks = array("q", [0])
        self._modes = array("b") if with_modes else None
        assert (self._lengths.itemsize, self._marks.itemsize) == (LENGTH_DTYPE.itemsize, MARK_DTYPE.itemsize)
        self._bin_tmp, self._idx_tmp = (temporary_name(path) for path in self._final_paths())
        self._bin = self._bin_tmp.open("xb")

    def add_document(
        self, tokens: ArrayLike, lengths: Sequence[int] | None = None, modes: Sequence[int] | None = None
    ) -> None:
        """Append one document.

        Args:
            tokens: of all its sequences, one after the other, [document length].
            lengths: of its sequences; None means one sequence, or none when there are no tokens.
            modes: of its sequences; zeros when left out.

        Raises: DataError: if a token does not fit the dtype.
        """
        tokens = np.asarray(tokens)
        if lengths is None:
            lengths = [len(tokens)] if len(tokens) else []
        assert sum(lengths) == len(tokens), f"sequences of {sum(lengths)} tokens in a document of {len(tokens)}"
        self._write(tokens)
        self._append_lengths(np.asarray(lengths, np.int64))
        if self._modes is not None:
            self._modes.extend(modes if modes is not None else [0] * len(lengths))
        self._marks.append(len(self._lengths))

    def add_documents(self, tokens: NDArray, lengths: NDArray[np.int64]) -> None:
        """Append many documents of one sequence each; a document of length 0 has no sequence, as in Megatron.

        Args:
            tokens: of all documents, [sum of lengths].
            lengths: tokens in each document, [n].

        Raises: DataError: if a token does not fit the dtype.
        """
        assert int(lengths.sum()) == len(tokens), f"documents of {lengths.sum()} tokens, but {len(tokens)} tokens"
        self._write(tokens)
        marks = len(self._lengths) + np.cumsum(lengths > 0)
        self._append_lengths(lengths[lengths > 0])
        if self._modes is not None:
            self._modes.extend([0] * int(np.count_nonzero(lengths)))
        self._marks.frombytes(marks.astype(MARK_DTYPE).tobytes())

    def add_dataset(self, dataset: IndexedDataset) -> None:
        """Append all documents of a dataset, reading its tokens as a stream.

        Raises: DataError: if its dtype differs, or it has modes and this one has not (or the reverse).
        """
        require_same_kind(dataset, self.dtype, self._modes is not None)
        for block in dataset.token_blocks(_COPY_TOKENS):
            self._bin.write(block.data)
        marks = len(self._lengths) + dataset.document_marks[1:]
        self._lengths.frombytes(dataset.lengths.tobytes())
        self._marks.frombytes(marks.astype(MARK_DTYPE).tobytes())
        if self._modes is not None and dataset.modes is not None:
            self._modes.frombytes(dataset.modes.tobytes())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._commit()
        finally:
            self._bin.close()
            self._bin_tmp.unlink(missing_ok=True)
            self._idx_tmp.unlink(missing_ok=True)

    def _final_paths(self) -> tuple[Path, Path]:
        return bin_path(self.prefix), idx_path(self.prefix)

    def _write(self, tokens: NDArray) -> None:
        if tokens.dtype != self.dtype and len(tokens):
            self._require_in_range(tokens)
        self._bin.write(tokens.astype(self.dtype, copy=False).tobytes())

    def _require_in_range(self, tokens: NDArray) -> None:
        if self.dtype.kind not in "iu":
            return
        limits = np.iinfo(self.dtype)
        lowest, highest = tokens.min(), tokens.max()
        if lowest < limits.min or highest > limits.max:
            wrong = lowest if lowest < limits.min else highest
            rule = f"{self.dtype} holds {limits.min} to {limits.max}"
            raise DataError(Problem(f"token id {wrong}", rule, "choose a wider dtype"), f"output {self.prefix}")

    def _append_lengths(self, lengths: NDArray[np.int64]) -> None:
        longest = int(lengths.max(initial=0))
        if longest > np.iinfo(LENGTH_DTYPE).max:
            rule = f"an index holds lengths up to {np.iinfo(LENGTH_DTYPE).max:,}"
            raise DataError(Problem(f"{longest:,} tokens in a document", rule, "split it"), f"output {self.prefix}")
        self._lengths.frombytes(lengths.astype(LENGTH_DTYPE).tobytes())

    def _commit(self) -> None:
        sync(self._bin)
        self._write_index()
        require_free(self.prefix, self.overwrite)  # another process may have finished first
        bin_final, idx_final = self._final_paths()
        idx_final.unlink(missing_ok=True)  # so that the old index never stands beside the new tokens
        self._bin_tmp.replace(bin_final)
        self._idx_tmp.replace(idx_final)
        sync_directory(bin_final.parent)

    def _write_index(self) -> None:
        lengths = np.frombuffer(self._lengths, LENGTH_DTYPE) if self._lengths else np.empty(0, LENGTH_DTYPE)
        ends = np.cumsum(lengths, dtype=POINTER_DTYPE) * self.dtype.itemsize
        pointers = np.concatenate([np.zeros(1, POINTER_DTYPE), ends])[:-1]
        modes = np.frombuffer(self._modes, MODE_DTYPE) if self._modes else np.empty(0, MODE_DTYPE)
        with self._idx_tmp.open("xb") as file:
            file.write(HEADER.pack(MAGIC, VERSION, dtype_code(self.dtype), len(lengths), len(self._marks)))
            for section in (lengths, pointers, np.frombuffer(self._marks, MARK_DTYPE), modes):
                file.write(section.data)
            sync(file)


def require_same_kind(dataset: IndexedDataset, dtype: np.dtype, with_modes: bool) -> None:
    """Refuse a dataset whose tokens or modes can't be appended to tokens of `dtype`.

    Raises: DataError: if the dtype differs, or only one side has modes.
    """
    problems = []
    if dataset.dtype != dtype:
        remedy = "preprocess it with the same vocabulary size: 65,500 ids and more need int32"
        problems.append(Problem(f"dtype {dataset.dtype}", f"must be {dtype}, as in the first dataset", remedy))
    if (dataset.modes is not None) != with_modes and len(dataset):
        has, needs = ("modes", "none") if not with_modes else ("no modes", "modes")
        problems.append(Problem(f"has {has}", f"the first dataset has {needs}", "merge datasets of one kind"))
    if problems:
        raise DataError(problems, str(dataset.prefix))
