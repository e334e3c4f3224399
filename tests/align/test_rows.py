"""Rows: every example once an epoch, packed or not, the same on every layout."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megascratch.align.examples import Example, TokenSequence
from megascratch.align.rows import Rows, collate_rows, packed


def _example(*lengths: int) -> Example:
    sequences = tuple(TokenSequence(np.arange(1, n + 1, dtype=np.int32), np.arange(n) >= n // 2) for n in lengths)
    return Example("here", sequences, {"margin": float(sum(lengths))})


@given(st.lists(st.integers(1, 30), min_size=1, max_size=60))
def test_bins_hold_every_item_once_and_never_too_much(sizes: list[int]) -> None:
    bins = packed(sizes, 30)
    assert sorted(item for items in bins for item in items) == list(range(len(sizes)))
    assert all(sum(sizes[item] for item in items) <= 30 for items in bins)
    assert len(bins) <= 11 / 9 * -(-sum(sizes) // 30) * 2


@pytest.mark.parametrize("packing", [False, True])
def test_an_epoch_reads_every_example_once_in_an_order_of_its_own(packing: bool) -> None:
    rows = Rows([_example(3 + i % 5, 4) for i in range(20)], 16, packing, seed=1)
    epochs = []
    for epoch in range(2):
        first = epoch * rows.epoch_samples
        seen = [member for i in range(rows.epoch_samples) for member in rows.documents_of(first + i)]
        assert sorted(seen) == sorted((number, part) for number in range(20) for part in range(2))
        epochs.append(seen)
    assert epochs[0] != epochs[1]
    again = Rows(rows.examples, 16, packing, seed=1)
    assert again.documents_of(rows.epoch_samples) == rows.documents_of(rows.epoch_samples)


def test_a_packed_row_restarts_positions_and_documents() -> None:
    rows = Rows([_example(4, 3), _example(3, 2)], 9, packing=True, seed=None)
    batch = collate_rows(rows, range(1))
    assert batch.tokens[0].tolist() == [1, 2, 3, 1, 2, 1, 2, 1, 0]
    assert batch.labels[0].tolist() == [2, 3, 4, 2, 3, 2, 3, 2, 0]
    assert batch.position_ids[0].tolist() == [0, 1, 2, 0, 1, 0, 1, 0, 1]
    assert batch.documents[0].tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 4]
    assert batch.loss_mask[0].tolist() == [0, 1, 1, 1, 1, 1, 1, 1, 0]
    assert batch.of_samples["present"].tolist() == [[1, 1, 1, 1]]
    assert batch.of_samples["answer"].tolist() == [[0, 1, 2, 3]]
    assert batch.of_samples["n_learned"].tolist() == [[2, 2, 2, 1]]
    assert batch.of_samples["margin"].tolist() == [[7, 7, 5, 5]]


def test_unpacked_pairs_are_neighbours() -> None:
    rows = Rows([_example(4, 3), _example(3, 2)], 5, packing=False, seed=7)
    batch = collate_rows(rows, range(4))
    assert batch.of_samples["answer"].flatten().tolist() in ([0, 1, 2, 3], [2, 3, 0, 1])
    assert torch.equal(batch.position_ids, torch.arange(5).expand(4, 5)), "padding too, as where no positions are given"
    assert all(batch.loss_mask.sum(1) > 0)
