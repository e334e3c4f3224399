"""A dataset in plain words: what `megascratch inspect` shows."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megascratch.data.indexed import IndexedDataset
from megascratch.tokenizer import Tokenizer

_QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


@dataclass(frozen=True)
class DocumentStart:
    """How a document begins.

    Attributes:
        document: its number.
        n_tokens: its whole length.
        ids: its first token ids.
        text: those decoded, or None without a tokenizer.
    """

    document: int
    n_tokens: int
    ids: list[int]
    text: str | None


@dataclass(frozen=True)
class DatasetDescription:
    """An indexed dataset in numbers.

    Attributes:
        prefix: its path without `.bin` and `.idx`.
        n_documents, n_sequences, n_tokens: how much it holds; an empty document has no sequence.
        dtype: of the tokens.
        has_modes: whether each sequence has a modality.
        bin_bytes, idx_bytes: sizes of its files.
        length_quantiles: tokens in a sequence at each quantile; empty when there are no sequences.
        starts: the beginnings of its first documents.
    """

    prefix: Path
    n_documents: int
    n_sequences: int
    n_tokens: int
    dtype: str
    has_modes: bool
    bin_bytes: int
    idx_bytes: int
    length_quantiles: dict[float, int]
    starts: list[DocumentStart]


def describe_dataset(
    prefix: Path | str, tokenizer: Tokenizer | None = None, *, n_documents: int = 3, n_tokens: int = 64
) -> DatasetDescription:
    """Describe the dataset at `prefix`, with the first `n_tokens` of its first `n_documents`.

    Raises: DataError: if it does not open.
    """
    dataset = IndexedDataset(prefix)
    starts = []
    for document in range(min(n_documents, dataset.n_documents)):
        tokens = dataset.document(document)
        ids = tokens[:n_tokens].tolist()
        text = tokenizer.decode(ids) if tokenizer is not None else None
        starts.append(DocumentStart(document, len(tokens), ids, text))
    # "lower" gives lengths that occur.
    quantiles = np.quantile(dataset.lengths, _QUANTILES, method="lower").tolist() if len(dataset) else []
    return DatasetDescription(
        prefix=dataset.prefix,
        n_documents=dataset.n_documents,
        n_sequences=len(dataset),
        n_tokens=dataset.n_tokens,
        dtype=dataset.dtype.name,
        has_modes=dataset.modes is not None,
        bin_bytes=dataset.bin_bytes,
        idx_bytes=dataset.idx_path.stat().st_size,
        length_quantiles=dict(zip(_QUANTILES, map(int, quantiles))),
        starts=starts,
    )
