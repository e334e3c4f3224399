"""The sampler: the same global batches for every layout, resumable anywhere, in Megatron's order."""

import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megascratch.config import TrainConfig
from megascratch.data.blend import build_datasets
from megascratch.data.sampler import Batches, microbatch_ids
from megascratch.errors import DataError


@pytest.fixture
def train(make_dataset, tmp_path):
    prefix = make_dataset("d", [37] * 40)
    return build_datasets([prefix], None, "1", 12, 1, (96, 0, 0), tmp_path / "cache").train


def test_the_worked_example_of_the_module():
    assert [list(ids) for ids in microbatch_ids(0, 8, 2, 0, 1)] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert [list(ids) for ids in microbatch_ids(0, 8, 2, 0, 2)] == [[0, 1], [4, 5]]
    assert [list(ids) for ids in microbatch_ids(0, 8, 2, 1, 2)] == [[2, 3], [6, 7]]


@settings(max_examples=200, deadline=None)
@given(consumed=st.integers(0, 10**12), micro=st.integers(1, 5), dp=st.integers(1, 8), accumulate=st.integers(1, 6))
def test_ranks_partition_the_global_batch(consumed, micro, dp, accumulate):
    global_batch = micro * dp * accumulate
    ranks = [microbatch_ids(consumed, global_batch, micro, rank, dp) for rank in range(dp)]
    assert all(len(of_rank) == accumulate for of_rank in ranks)
    read = [i for m in range(accumulate) for rank in range(dp) for i in ranks[rank][m]]
    assert read == list(range(consumed, consumed + global_batch))


@pytest.mark.parametrize(("micro", "dp"), [(1, 1), (2, 3), (3, 2), (1, 4)])
def test_ids_of_megatrons_sampler(micro, dp):
    """Megatron cuts each run of micro * dp ids into dp slices; written out here, for its class lives in no package."""
    consumed, global_batch = 48, micro * dp * 4
    for rank in range(dp):
        expected = []
        for start in range(consumed, consumed + global_batch, micro * dp):
            batch = list(range(start, start + micro * dp))
            expected.append(batch[rank * micro : (rank + 1) * micro])
        assert [list(ids) for ids in microbatch_ids(consumed, global_batch, micro, rank, dp)] == expected


@pytest.mark.parametrize(
    ("start", "increment", "samples", "final"), [(2, 2, 12, 6), (16, 8, 3000, 64), (1, 3, 100, 22)]
)
def test_a_batch_grows_as_megatrons_does(start, increment, samples, final):
    from megatron.core.num_microbatches_calculator import RampupBatchsizeNumMicroBatchesCalculator

    theirs = RampupBatchsizeNumMicroBatchesCalculator(final, 1, 1, False, 1, start, increment, samples)
    train = TrainConfig(global_batch=final, rampup_batch_size=(start, increment, samples))
    sizes, consumed = [], 0
    while consumed < 2 * samples:
        theirs.update(consumed, consistency_check=True)
        sizes.append(train.batch_at(consumed))
        assert sizes[-1] == theirs.get_current_global_batch_size()
        consumed += sizes[-1]
        assert train.samples_of(len(sizes)) == consumed
    assert sorted(set(sizes)) == list(range(start, final + 1, increment))


def test_a_microbatch(train):
    microbatch = Batches(train, 8, 2, 1, 2).at(16)[1]
    assert microbatch.sample_ids.tolist() == [22, 23]
    for row, sample in enumerate((22, 23)):
        assert microbatch.tokens[row].tolist() == train[sample].tokens.tolist()
        assert microbatch.labels[row].tolist() == train[sample].labels.tolist()
    for name, dtype in (("tokens", torch.int64), ("labels", torch.int64), ("position_ids", torch.int64)):
        assert getattr(microbatch, name).dtype == dtype
        assert getattr(microbatch, name).shape == (2, 12)
    assert microbatch.loss_mask.dtype == torch.float32
    assert microbatch.sample_ids.dtype == torch.int64
    assert torch.equal(microbatch.position_ids, torch.arange(12).expand(2, 12))
    moved = microbatch.to("meta")
    assert all(x.is_meta for x in moved.tensors())


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_any_layout_reads_the_same_tokens_and_resumes_on_another(train, prefetch):
    def read(dp, micro, consumed, n_steps):
        """Tokens of every sample of each step, whoever read it."""
        steps = [{} for _ in range(n_steps)]
        for rank in range(dp):
            for step, microbatches in enumerate(Batches(train, 12, micro, rank, dp).steps(consumed, n_steps, prefetch)):
                for microbatch in microbatches:
                    for sample, tokens in zip(microbatch.sample_ids.tolist(), microbatch.tokens):
                        assert sample not in steps[step]
                        steps[step][sample] = tuple(tokens.tolist())
        return steps

    whole = read(1, 3, 0, 4)
    assert [sorted(step) for step in whole] == [list(range(12 * k, 12 * k + 12)) for k in range(4)]
    assert read(4, 1, 0, 4) == whole
    assert read(2, 2, 0, 2) + read(3, 4, 24, 2) == whole


def test_the_end_of_the_data(train):
    batches = Batches(train, 40, 40, 0, 1)
    with pytest.raises(DataError, match=rf"160 samples are needed +the dataset has {len(train)}"):
        batches.require(160)
    read = []
    with pytest.raises(DataError, match="160 samples are needed"):
        read.extend(batches.steps(0, 5))
    assert len(read) == 3


def test_errors_of_the_reading_thread_arrive_and_leaving_early_ends_it(train):
    class Broken:
        def __len__(self):
            return 1000

        def __getitem__(self, sample):
            if sample >= 4:
                raise DataError([], "sample 4")
            return train[sample]

    steps = Batches(Broken(), 2, 2, 0, 1).steps(0, 10)
    assert [len(next(steps)) for _ in range(2)] == [1, 1]
    with pytest.raises(DataError, match="sample 4"):
        next(steps)

    before = threading.active_count()
    early = Batches(train, 2, 2, 0, 1).steps(0, 10)
    next(early)
    early.close()
    for thread in threading.enumerate():
        if thread.name.startswith("read-samples"):
            thread.join(timeout=5)
    assert threading.active_count() <= before


def test_samples_are_not_shared_between_microbatches(train):
    """A microbatch that the engine edits in place must leave the file and the next microbatch alone."""
    batches = Batches(train, 2, 2, 0, 1)
    first = batches.at(0)[0]
    first.tokens.zero_()
    assert np.array_equal(batches.at(0)[0].tokens[0].numpy(), train[0].tokens)
