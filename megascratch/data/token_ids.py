"""Token ids against the vocabulary: the wrong tokenizer is noticed before the embedding reads out of its table."""

import numpy as np
from numpy.typing import NDArray

from megascratch.data.indexed import IndexedDataset
from megascratch.errors import DataError, Problem

_BLOCK_TOKENS = 1 << 20
_SCANNED_BLOCKS = 64  # 64 Mi tokens, a fraction of a second; every sample is checked again when it is read


def outside_vocabulary(tokens: NDArray, vocab_size: int) -> int | None:
    """Return the position of the first token that is negative or not below `vocab_size`, or None."""
    if not len(tokens) or (int(tokens.max()) < vocab_size and int(tokens.min()) >= 0):
        return None
    return int(np.argmax((tokens < 0) | (tokens >= vocab_size)))


def check_token_ids(dataset: IndexedDataset, vocab_size: int | None) -> None:
    """Look for ids outside the vocabulary: everywhere in a small dataset, in evenly spaced blocks of a large one.

    Args:
        dataset: the tokens.
        vocab_size: ids must be below it; None: only the dtype is checked.

    Raises: DataError: for the first one found, or when the dtype is not a whole number.
    """
    if dataset.dtype.kind not in "iu":
        problem = Problem(f"tokens are {dataset.dtype}", "token ids are whole numbers", "preprocess the text again")
        raise DataError(problem, str(dataset.prefix))
    if vocab_size is None:
        return
    n_blocks = -(-dataset.n_tokens // _BLOCK_TOKENS)
    stride = max(1, -(-n_blocks // _SCANNED_BLOCKS))
    first = 0
    for number, block in enumerate(dataset.token_blocks(_BLOCK_TOKENS)):
        if (not dataset.contiguous or number % stride == 0) and (
            position := outside_vocabulary(block, vocab_size)
        ) is not None:
            sequence = _sequence_of_token(dataset, first + position)
            raise outside_error(dataset, sequence, int(block[position]), vocab_size)
        first += len(block)


def outside_error(
    dataset: IndexedDataset, sequence: int, token: int, vocab_size: int, sample: int | None = None
) -> DataError:
    """Return the error that names the file, the document and the token (and the sample that met it)."""
    document = int(np.searchsorted(dataset.document_marks, sequence, side="right")) - 1
    met = "" if sample is None else f", read as sample {sample}"
    return DataError(
        Problem(
            f"token id {token} in document {document}{met}",
            f"must be 0 to {vocab_size - 1}, as model.vocab_size = {vocab_size}",
            "use the tokenizer that the data was preprocessed with, or raise model.vocab_size",
        ),
        str(dataset.bin_path),
    )


def _sequence_of_token(dataset: IndexedDataset, token: int) -> int:
    ends = np.cumsum(dataset.lengths, dtype=np.int64)
    return int(np.searchsorted(ends, token, side="right"))
