"""Rows: examples laid into sequences of one length, with or without packing, as a function of the sample's number.

A row is `s` places. Unpacked, each sequence has a row of its own, and the two of a pair follow each other. Packed,
whole examples share a row by best fit, largest first; each sequence is a document: positions restart, and no token
attends to another document. By hand, s = 8, pairs of 3 + 2 and 2 + 1 places, one document after the other, `.` padding:

    unpacked   c c c . . . . .        packed   c c c r r c c r
               r r . . . . . .                 0 0 0 1 1 2 2 3     documents
               c c . . . . . .                 0 1 2 0 1 0 1 0     positions
               r . . . . . . .

Which rows there are depends on the data alone; each epoch visits them in an order of its own, drawn from the seed. The
row of sample i is therefore a function of (data, seed, i), and a run resumes on any layout.

Legend: `b` rows of a micro-batch, `s` places, `n` documents of a row at most.
"""

import bisect
import copy
import sys
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from megascratch.align.examples import Example
from megascratch.data.microbatch import Microbatch

Bin = list[int]  # numbers of the examples in a row


class Rows:
    """Examples as an endless dataset of rows.

    Args:
        examples: at least one.
        seq_length: places of a row.
        packing: whether examples share rows.
        seed: of the order; None keeps that of the data, for validation.
        sizes: places that each example is given when packing; what it takes, when left out. With equal sizes, two sets
            of examples lie in the same rows.
        first_answer: number of the first example's first sequence; the others follow.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        seq_length: int,
        packing: bool,
        seed: int | None,
        sizes: Sequence[int] | None = None,
        first_answer: int = 0,
    ) -> None:
        self.examples, self.seq_length, self.seed, self.first_answer = examples, seq_length, seed, first_answer
        self.n_sequences = len(examples[0].sequences)
        sizes = sizes or [example.n_places for example in examples]
        self.bins = packed(sizes, seq_length) if packing else [[number] for number in range(len(examples))]
        self.rows_per_bin = 1 if packing else self.n_sequences
        self.n_documents = max(map(len, self.bins)) * self.n_sequences // self.rows_per_bin
        self._order: tuple[int, NDArray[np.int64]] = (-1, np.empty(0, np.int64))

    def __len__(self) -> int:
        return sys.maxsize  # epochs follow each other without end

    def in_order(self) -> "Rows":
        """Return the same rows, in one order for all epochs."""
        other = copy.copy(self)
        other.seed = None
        return other

    @property
    def n_answers(self) -> int:
        """Sequences of all examples."""
        return len(self.examples) * self.n_sequences

    @property
    def epoch_samples(self) -> int:
        """Rows of one pass over the data."""
        return len(self.bins) * self.rows_per_bin

    def documents_of(self, sample: int) -> list[tuple[int, int]]:
        """Return what stands in a row: (number of the example, which of its sequences), in order."""
        unit, part = divmod(sample, self.rows_per_bin)
        epoch, index = divmod(unit, len(self.bins))
        members = self.bins[self._permutation(epoch)[index]]
        parts = range(self.n_sequences) if self.rows_per_bin == 1 else [part]
        return [(number, i) for number in members for i in parts]

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        if self.seed is None:
            return np.arange(len(self.bins))
        if self._order[0] != epoch:
            self._order = epoch, np.random.default_rng((self.seed, epoch)).permutation(len(self.bins))
        return self._order[1]


def packed(sizes: Sequence[int], capacity: int) -> list[Bin]:
    """Lay items, none larger than a bin, into bins by best fit, largest first: at most 22% more bins than are needed.

    Source: Johnson et al. 1974, SIAM J. Comput. 3 (4).
    """
    by_size = sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))
    bins: list[Bin] = []
    room: list[tuple[int, int]] = []  # (places left, bin), sorted
    for item in by_size:
        at = bisect.bisect_left(room, (sizes[item], -1))
        if at < len(room):
            left, index = room.pop(at)
            bins[index].append(item)
        else:
            left, index = capacity, len(bins)
            bins.append([item])
        if left > sizes[item]:
            bisect.insort(room, (left - sizes[item], index))
    return bins


def collate_rows(rows: Rows, sample_ids: range) -> Microbatch:
    """Write rows out as one micro-batch.

    Besides the examples' own values, `of_samples` has, [b, n] each: `present`, 1 where there is a document; `answer`,
    its number among all; `n_learned`, its tokens to be learned.
    """
    b, s, n = len(sample_ids), rows.seq_length, rows.n_documents
    tokens, labels, positions, documents = (np.zeros((b, s), np.int64) for _ in range(4))
    mask = np.zeros((b, s), np.float32)
    names = ("present", "n_learned", *rows.examples[0].values)
    values = {name: np.zeros((b, n)) for name in names}
    numbers = np.zeros((b, n), np.int64)
    for row, sample in enumerate(sample_ids):
        start = 0
        members = rows.documents_of(sample)
        for document, (number, part) in enumerate(members):
            example = rows.examples[number]
            sequence = example.sequences[part]
            place = slice(start, start + sequence.n_places)
            tokens[row, place], labels[row, place] = sequence.ids[:-1], sequence.ids[1:]
            mask[row, place] = sequence.learned[1:]
            # In the padding positions go on: without packing, they are those of a row that has none.
            positions[row, start:], documents[row, start:] = np.arange(s - start), document
            values["present"][row, document] = 1.0
            values["n_learned"][row, document] = sequence.learned.sum()
            numbers[row, document] = rows.first_answer + number * rows.n_sequences + part
            for name, value in example.values.items():
                values[name][row, document] = value
            start = place.stop
        documents[row, start:] = len(members)
    of_samples = {name: torch.from_numpy(value) for name, value in values.items()}
    return Microbatch(
        tokens=torch.from_numpy(tokens),
        labels=torch.from_numpy(labels),
        loss_mask=torch.from_numpy(mask),
        position_ids=torch.from_numpy(positions),
        documents=torch.from_numpy(documents),
        sample_ids=torch.tensor(sample_ids, dtype=torch.int64),
        of_samples={**of_samples, "answer": torch.from_numpy(numbers)},
    )
