"""Writing an indexed dataset: whole under its final name, or not there at all.

Tokens stream into `<prefix>.bin.<random>.tmp`, lengths and document marks into nameless files beside it, so memory does
not grow with the dataset. When the writer is left without an error, both files are flushed to disk and renamed, the
index last: a dataset without its `.idx` does not open, so no reader ever sees half of one.
"""

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

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
_COPY_BYTES = 1 << 20
_INDEX_SEQUENCES = 1 << 16  # below 4 MB: from there on numpy asks for huge pages, and clearing one takes milliseconds


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
        durable: flush to the disk at the end, so that the dataset survives a power cut.
        scratch: directory of the temporary files, on the same file system; beside the dataset when left out.

    Raises: DataError: if the prefix is taken and `overwrite` is not asked.
    """

    def __init__(
        self,
        prefix: Path | str,
        dtype: np.dtype,
        *,
        with_modes: bool = False,
        overwrite: bool = False,
        durable: bool = True,
        scratch: Path | None = None,
    ) -> None:
        require_free(prefix, overwrite)
        self.prefix = Path(prefix)
        self.dtype = np.dtype(dtype)
        self.overwrite = overwrite
        self.durable = durable
        self._n_sequences = 0
        scratch = scratch or self.prefix.parent
        self._lengths, self._marks = _nameless(scratch), _nameless(scratch)
        self._modes = _nameless(scratch) if with_modes else None
        self._append(self._marks, np.zeros(1, MARK_DTYPE))
        self._bin_tmp, self._idx_tmp = (temporary_name(scratch / path.name) for path in self._final_paths())
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
            self._append(self._modes, np.asarray(modes if modes is not None else [0] * len(lengths), MODE_DTYPE))
        self._append(self._marks, np.array([self._n_sequences], MARK_DTYPE))

    def add_files(self, tokens: Path, lengths: Path) -> None:
        """Append many documents of one sequence each; a document of length 0 has no sequence, as in Megatron.

        Args:
            tokens: a file of all documents end to end, in the dtype of this dataset.
            lengths: a file of the number of tokens in each document, int64.
        """
        n_tokens = 0
        with lengths.open("rb") as file:
            while len(block := np.fromfile(file, np.int64, _INDEX_SEQUENCES)):
                n_tokens += int(block.sum())
                marks = self._n_sequences + np.cumsum(block > 0, dtype=MARK_DTYPE)
                self._append_lengths(block[block > 0])
                if self._modes is not None:
                    self._append(self._modes, np.zeros(np.count_nonzero(block), MODE_DTYPE))
                self._append(self._marks, marks)
        before = self._bin.tell()
        with tokens.open("rb", buffering=0) as file:
            shutil.copyfileobj(file, self._bin, _COPY_BYTES)
        assert self._bin.tell() == before + n_tokens * self.dtype.itemsize, f"{tokens} does not have {n_tokens} tokens"

    def add_dataset(self, dataset: IndexedDataset) -> None:
        """Append all documents of a dataset, reading its tokens as a stream.

        Raises: DataError: if its dtype differs, or it has modes and this one has not (or the reverse).
        """
        require_same_kind(dataset, self.dtype, self._modes is not None)
        for block in dataset.token_blocks(_COPY_TOKENS):
            self._bin.write(block.data)
        self._append(self._marks, self._n_sequences + dataset.document_marks[1:])
        self._append(self._lengths, dataset.lengths)
        self._n_sequences += len(dataset)
        if self._modes is not None and dataset.modes is not None:
            self._append(self._modes, dataset.modes)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._commit()
        finally:
            for file in self._files():
                file.close()
            self._bin_tmp.unlink(missing_ok=True)
            self._idx_tmp.unlink(missing_ok=True)

    def _final_paths(self) -> tuple[Path, Path]:
        return bin_path(self.prefix), idx_path(self.prefix)

    def _write(self, tokens: NDArray) -> None:
        if tokens.dtype != self.dtype and len(tokens):
            self._require_in_range(tokens)
        self._append(self._bin, tokens.astype(self.dtype, copy=False))

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
        self._append(self._lengths, lengths.astype(LENGTH_DTYPE))
        self._n_sequences += len(lengths)

    @staticmethod
    def _append(file: BinaryIO, values: NDArray) -> None:
        file.write(np.ascontiguousarray(values).data)

    def _files(self) -> list[BinaryIO]:
        return [self._bin, self._lengths, self._marks, *([self._modes] if self._modes is not None else [])]

    def _commit(self) -> None:
        self._bin.flush()
        self._write_index()
        if self.durable:
            sync(self._bin)
        require_free(self.prefix, self.overwrite)  # another process may have finished first
        bin_final, idx_final = self._final_paths()
        idx_final.unlink(missing_ok=True)  # so that the old index never stands beside the new tokens
        self._bin_tmp.replace(bin_final)
        self._idx_tmp.replace(idx_final)
        if self.durable:
            sync_directory(bin_final.parent)

    def _write_index(self) -> None:
        n_marks = self._marks.tell() // MARK_DTYPE.itemsize
        for file in self._files()[1:]:
            file.seek(0)  # which flushes, too
        with self._idx_tmp.open("xb") as index:
            index.write(HEADER.pack(MAGIC, VERSION, dtype_code(self.dtype), self._n_sequences, n_marks))
            shutil.copyfileobj(self._lengths, index, _COPY_BYTES)
            self._lengths.seek(0)
            start = 0
            while block := self._lengths.read(_INDEX_SEQUENCES * LENGTH_DTYPE.itemsize):
                ends = start + np.cumsum(np.frombuffer(block, LENGTH_DTYPE), dtype=POINTER_DTYPE) * self.dtype.itemsize
                self._append(index, np.concatenate([[start], ends[:-1]]).astype(POINTER_DTYPE))
                start = int(ends[-1])
            shutil.copyfileobj(self._marks, index, _COPY_BYTES)
            if self._modes is not None:
                shutil.copyfileobj(self._modes, index, _COPY_BYTES)
            if self.durable:
                sync(index)


def _nameless(directory: Path) -> BinaryIO:
    return tempfile.TemporaryFile(dir=directory)


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
