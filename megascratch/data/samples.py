"""GPT samples: fixed-length pieces of a shuffled stream of documents, in Megatron's order.

Three documents of 3, 2 and 4 tokens, seq_length 2, one epoch of 9 tokens: (9 - 1) // 2 = 4 samples.

    document index  [2, 0, 1]                      the documents, shuffled; once an epoch
    stream          d2d2d2d2 d0d0d0 d1d1
    sample index    (0,0) (0,2) (1,0) (1,2) (2,1)  position in the document index, token in that document;
                                                   sample k reads from row k to row k + 1 inclusive: 3 tokens,
                                                   the last of which is the first of sample k + 1
    shuffle index   [3, 1, 0, 2]                   the order in which training meets the samples

When the last of several epochs is needed to less than 80 %, its documents are shuffled apart from the others, and so
are its samples: otherwise some documents would be met once more than the rest, anywhere in training.

Seeds give the samples of megatron-core's `GPTDataset`. A "document" here is one sequence of the indexed dataset.

Legend: `s` sequence length.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from megascratch.data._sample_index import fill_sample_index
from megascratch.data.index_cache import load_or_build
from megascratch.data.indexed import IndexedDataset
from megascratch.data.token_ids import outside_error, outside_vocabulary
from megascratch.errors import DataError, Problem

FINAL_EPOCH_THRESHOLD = 0.80  # share of the final epoch below which it is shuffled apart


@dataclass(frozen=True)
class Sample:
    """One training sample.

    Attributes:
        text: its tokens and the one behind them, [s + 1] int64.
        loss_mask: 1 where the loss counts, [s] float32.
        position_ids: of the inputs, [s] int64.
    """

    text: NDArray[np.int64]
    loss_mask: NDArray[np.float32]
    position_ids: NDArray[np.int64]

    @property
    def tokens(self) -> NDArray[np.int64]:
        """Inputs, [s]."""
        return self.text[:-1]

    @property
    def labels(self) -> NDArray[np.int64]:
        """The token that follows each input, [s]."""
        return self.text[1:]


class SampleDataset(Protocol):
    """What the sampler reads from: a GPTDataset or a blend of them."""

    def __len__(self) -> int:
        """Return the number of samples."""
        ...

    def __getitem__(self, sample: int) -> Sample:
        """Return a sample."""
        ...


@dataclass(frozen=True)
class EodRules:
    """What an end-of-document token does inside a sample.

    Attributes:
        eod_id: its id; None when the tokenizer has none.
        mask_loss: leave out the loss where the input is one: what follows is unrelated.
        reset_position_ids: count positions from 0 again behind one.
    """

    eod_id: int | None = None
    mask_loss: bool = False
    reset_position_ids: bool = False

    def __post_init__(self) -> None:
        if self.eod_id is None and (self.mask_loss or self.reset_position_ids):
            option = "data.eod_mask_loss" if self.mask_loss else "data.reset_position_ids"
            rule = "needs an end-of-document token, and the tokenizer has none"
            raise DataError(Problem(f"{option} = true", rule, "set data.tokenizer to one that has it"))


def loss_mask(tokens: NDArray[np.int64], rules: EodRules) -> NDArray[np.float32]:
    """Return 1 where the loss of the next token counts, [s] float32."""
    if not rules.mask_loss:
        return np.ones(len(tokens), np.float32)
    return (tokens != rules.eod_id).astype(np.float32)


def position_ids(tokens: NDArray[np.int64], rules: EodRules) -> NDArray[np.int64]:
    """Return the position of each token in the sample, or in its document when positions are reset, [s] int64."""
    positions = np.arange(len(tokens), dtype=np.int64)
    if not rules.reset_position_ids:
        return positions
    starts = np.zeros_like(positions)
    starts[1:] = np.where(tokens[:-1] == rules.eod_id, positions[1:], 0)
    return positions - np.maximum.accumulate(starts)


class GPTDataset:
    """Samples of a range of an indexed dataset's sequences.

    Args:
        indexed: the tokens.
        sequences: which of its sequences the samples are cut from.
        seq_length: tokens in a sample.
        n_samples: at least this many, over as many epochs as that takes; None: one epoch.
        seed: of both shuffles.
        cache_dir: where index arrays are kept.
        rules: what an end-of-document token does.
        vocab_size: ids at or above it are refused when a sample is read; None: not checked.

    `require_one_sample` and `check_token_ids` come first.
    """

    def __init__(
        self,
        indexed: IndexedDataset,
        sequences: range,
        seq_length: int,
        n_samples: int | None,
        seed: int,
        cache_dir: Path,
        rules: EodRules | None = None,
        vocab_size: int | None = None,
    ) -> None:
        self.indexed = indexed
        self.seq_length = seq_length
        self.rules = rules or EodRules()
        self.vocab_size = vocab_size
        self.description: dict[str, object] = {
            "index": "GPT samples, version 1",
            "lengths": {"sequences": len(indexed), "tokens": indexed.n_tokens, "xxh3": indexed.lengths_digest},
            "range": [sequences.start, sequences.stop],
            "seq_length": seq_length,
            "n_samples": n_samples,
            "seed": seed,
        }
        arrays = load_or_build(
            cache_dir,
            self.description,
            ("document_index", "sample_index", "shuffle_index"),
            lambda: build_sample_indices(indexed.lengths, sequences, seq_length, n_samples, seed),
        )
        self.document_index = arrays["document_index"]
        self.sample_index = arrays["sample_index"]
        self.shuffle_index = arrays["shuffle_index"]

    def __len__(self) -> int:
        return len(self.shuffle_index)

    def __getitem__(self, sample: int) -> Sample:
        if not 0 <= sample < len(self):
            raise IndexError(f"sample {sample} of {len(self)}")
        pieces = self._pieces(int(self.shuffle_index[sample]))
        parts = [self.indexed.get(sequence, begin, length) for sequence, begin, length in pieces]
        text = np.concatenate(parts, dtype=np.int64)
        if self.vocab_size is not None and (wrong := outside_vocabulary(text, self.vocab_size)) is not None:
            ends = np.cumsum([len(part) for part in parts])
            sequence = pieces[int(np.searchsorted(ends, wrong, side="right"))][0]
            raise outside_error(self.indexed, sequence, int(text[wrong]), self.vocab_size, sample)
        return Sample(text, loss_mask(text[:-1], self.rules), position_ids(text[:-1], self.rules))

    def _pieces(self, row: int) -> list[tuple[int, int, int]]:
        """Return (sequence, first token, tokens) of each document that a row of the sample index reads."""
        (first, first_token), (last, last_token) = self.sample_index[row : row + 2].tolist()
        pieces = []
        for position in range(first, last + 1):
            sequence = int(self.document_index[position])
            begin = first_token if position == first else 0
            end = last_token + 1 if position == last else int(self.indexed.lengths[sequence])
            pieces.append((sequence, begin, end - begin))
        return pieces


def require_one_sample(indexed: IndexedDataset, sequences: range, seq_length: int, part: str) -> None:
    """Refuse a range of sequences, the train, valid or test part, that holds less than one sample.

    Raises: DataError: with the numbers.
    """
    n_tokens = _n_tokens(indexed.lengths, sequences)
    if n_tokens <= seq_length:
        raise DataError(
            Problem(
                f"{part} has {len(sequences):,} of {len(indexed):,} documents, {n_tokens:,} tokens",
                f"not enough for one sample of data.seq_length + 1 = {seq_length + 1:,} tokens",
                f"add data, give {part} a larger share in data.split, or shorten data.seq_length",
            ),
            str(indexed.prefix),
        )


def build_sample_indices(
    lengths: NDArray[np.int32], sequences: range, seq_length: int, n_samples: int | None, seed: int
) -> dict[str, NDArray]:
    """Build the document, sample and shuffle index of a range of sequences.

    Args:
        lengths: tokens in each sequence of the dataset, [n_sequences] int32.
        sequences: the range.
        seq_length: tokens in a sample.
        n_samples: at least this many; None: one epoch.
        seed: of both shuffles.

    Returns: document_index [epochs * len(sequences)] int32; sample_index [n + 1, 2] int32, or int64 when there are
        more documents than that holds; shuffle_index [n] uint32 or int64.

    Source: megatron-core 0.16 `GPTDataset`; NumPy keeps the stream of RandomState the same in all its versions.
    """
    tokens_per_epoch = _n_tokens(lengths, sequences)
    n_epochs = 1 if n_samples is None else max(1, -(-(n_samples * seq_length + 1) // tokens_per_epoch))
    n_built = (n_epochs * tokens_per_epoch - 1) // seq_length
    n_before_final = ((n_epochs - 1) * tokens_per_epoch - 1) // seq_length
    samples_per_epoch = (tokens_per_epoch - 1) // seq_length
    final_apart = (
        n_samples is not None
        and n_epochs > 1
        and n_samples - n_before_final < int(FINAL_EPOCH_THRESHOLD * samples_per_epoch)
    )

    random = np.random.RandomState(seed)  # not default_rng: its stream is the contract
    one_epoch = np.arange(sequences.start, sequences.stop, dtype=np.int32)
    if final_apart:
        earlier = _shuffled(np.tile(one_epoch, n_epochs - 1), random)
        document_index = np.concatenate([earlier, _shuffled(one_epoch, random)])
    else:
        document_index = _shuffled(np.tile(one_epoch, n_epochs), random)

    wide = len(document_index) > np.iinfo(np.int32).max
    sample_index = np.empty((n_built + 1, 2), np.int64 if wide else np.int32)
    aligned = np.require(lengths, np.int32, ["C", "A"])  # the header has 34 bytes: in the file they never are
    fill_sample_index(aligned, document_index, seq_length, sample_index)

    dtype = np.int64 if n_built >= np.iinfo(np.uint32).max - 1 else np.uint32
    boundary = n_before_final if final_apart else n_built
    shuffle_index = np.concatenate(
        [
            _shuffled(np.arange(boundary, dtype=dtype), random),
            _shuffled(np.arange(boundary, n_built, dtype=dtype), random),
        ]
    )
    return {"document_index": document_index, "sample_index": sample_index, "shuffle_index": shuffle_index}


def _shuffled(values: NDArray, random: np.random.RandomState) -> NDArray:
    random.shuffle(values)
    return values


def _n_tokens(lengths: NDArray[np.int32], sequences: range) -> int:
    return int(lengths[sequences.start : sequences.stop].sum(dtype=np.int64))
