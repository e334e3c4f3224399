"""Blends: identical to megatron-core's, what they refuse, and that everything wrong is found at once."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megascratch.data._sample_index import fill_blend
from megascratch.data.blend import BlendedDataset, build_datasets
from megascratch.data.samples import EodRules
from megascratch.errors import DataError

NO_LIMIT = np.iinfo(np.int64).max


def blend(weights, size, limits=None):
    weights = np.asarray(weights, np.float64)
    limits = np.full(len(weights), NO_LIMIT) if limits is None else np.asarray(limits, np.int64)
    dataset_index, sample_index = np.empty(size, np.int16), np.empty(size, np.int64)
    fill_blend(weights, limits, dataset_index, sample_index)
    return dataset_index, sample_index


def test_the_worked_example_of_the_module():
    dataset_index, sample_index = blend([0.5, 0.3, 0.2], 10)
    assert dataset_index.tolist() == [0, 1, 2, 0, 1, 0, 2, 0, 1, 0]
    assert sample_index.tolist() == [0, 0, 0, 1, 1, 2, 1, 3, 2, 4]


@settings(max_examples=100, deadline=None)
@given(weights=st.lists(st.floats(1e-3, 1.0), min_size=1, max_size=7), size=st.integers(0, 300))
def test_blending_indices_of_megatron(megatron, weights, size):
    weights = np.array(weights) / sum(weights)
    expected = np.zeros(size, np.int16), np.zeros(size, np.int64)
    megatron.helpers.build_blending_indices(*expected, weights, len(weights), size, False)
    for ours, theirs in zip(blend(weights, size), expected):
        assert np.array_equal(ours, theirs)


@settings(max_examples=100, deadline=None)
@given(sizes=st.lists(st.integers(1, 60), min_size=1, max_size=7))
def test_exhaustive_blending_indices_of_megatron(megatron, sizes):
    sizes, total = np.array(sizes, np.int64), sum(sizes)
    expected = np.zeros(total, np.int16), np.zeros(total, np.int64)
    megatron.helpers.build_exhaustive_blending_indices(*expected, sizes, len(sizes))
    for ours, theirs in zip(blend(sizes / total, total, sizes), expected):
        assert np.array_equal(ours, theirs)


def test_the_builder_trusts_nobody():
    with pytest.raises(ValueError, match="limits add up to less"):
        blend([0.5, 0.5], 5, [2, 2])
    with pytest.raises(ValueError, match="must match in size"):
        blend([0.5, 0.5], 5, [2])
    with pytest.raises(ValueError, match="1 to 32767 datasets"):
        blend([], 5)


@pytest.fixture
def corpora(make_dataset) -> list[Path]:
    random = np.random.default_rng(0)
    return [make_dataset(f"d{i}", random.integers(0, 50, n).tolist(), seed=i) for i, n in enumerate((60, 100, 25))]


def megatron_datasets(megatron, paths, weights, split, seq_length, seed, n_samples):
    config = megatron.gpt.GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_length,
        blend=(list(map(str, paths)), weights),
        split=split,
        tokenizer=SimpleNamespace(eod=256, vocab_size=257, unique_identifiers={}),
        create_attention_mask=False,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=True,
    )
    build = megatron.builder.BlendedMegatronDatasetBuilder(megatron.gpt.GPTDataset, n_samples, lambda: True, config)
    return build.build()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("n_paths", "weights", "split", "seq_length", "seed", "n_samples"),
    [
        (3, [0.5, 0.2, 0.3], "80,10,10", 12, 1234, [400, 30, 20]),
        (3, [7, 1, 2], "90,10", 8, 1, [2500, 10, 0]),  # many epochs
        (2, [1.0, 1.0], "1", 16, 5, [33, 0, 0]),
        (1, [0.4], "90,10", 12, 3, [100, 7, 0]),  # a weight makes it a blend of one, with the surplus
        (1, None, "90,10", 12, 3, [100, 7, 0]),
        (3, None, "80,20", 12, 9, [150, 20, 0]),  # in proportion to the sizes
        (3, None, "80,10,10", 12, 9, [None, None, None]),  # every sample once
    ],
)
def test_blends_of_megatron(tmp_path, megatron, corpora, n_paths, weights, split, seq_length, seed, n_samples):
    paths = corpora[:n_paths]
    theirs = megatron_datasets(megatron, paths, weights, split, seq_length, seed, n_samples)
    rules = EodRules(256, mask_loss=True)
    ours = build_datasets(paths, weights, split, seq_length, seed, tuple(n_samples), tmp_path / "cache", rules=rules)
    for part, needed in enumerate(n_samples):
        if needed == 0:
            assert ours[part] is None
            continue
        assert len(ours[part]) == len(theirs[part])
        assert len(ours[part]) >= (needed or 1)
        for i in range(len(ours[part])):
            expected, sample = theirs[part][i], ours[part][i]
            for key in ("tokens", "labels", "loss_mask", "position_ids"):
                assert np.array_equal(getattr(sample, key), expected[key].numpy()), (part, i, key)


@pytest.mark.filterwarnings("ignore")
def test_the_surplus_of_megatron_decides_the_epochs(tmp_path, megatron, make_dataset):
    """Exactly one epoch is asked for; half a per cent more takes a second, and so another order."""
    path = make_dataset("d", [41] * 10)
    [theirs, _, _] = megatron_datasets(megatron, [path], [1.0], "1", 4, 1, [102, 0, 0])
    ours = build_datasets([path], [1.0], "1", 4, 1, (102, 0, 0), tmp_path / "cache").train
    assert len(ours.datasets[0]) == len(theirs.datasets[0]) == 204
    for i in range(102):
        assert np.array_equal(ours[i].tokens, theirs[i]["tokens"].numpy())


def test_a_short_blend_never_runs_out_of_a_dataset(tmp_path, make_dataset):
    """The greedy rule takes 14 samples of the last dataset, whose target is 12: Megatron stops with an IndexError."""
    paths = [make_dataset(f"d{i}", [50], seed=i) for i in range(5)]  # one sample an epoch
    train = build_datasets(paths, [4, 1, 1, 3, 11], "1", 49, 1, (21, 0, 0), tmp_path / "cache").train
    assert np.bincount(train.dataset_index).tolist() == [5, 1, 1, 4, 14]
    for i in range(len(train)):
        train[i]


def test_the_cache_stands_beside_the_data_unless_told(tmp_path, corpora):
    datasets = build_datasets(corpora, None, "1", 16, 1, (10, 0, 0))
    assert isinstance(datasets.train, BlendedDataset)
    assert (tmp_path / "index_cache").is_dir()
    with pytest.raises(IndexError):
        datasets.train[len(datasets.train)]


def refused(match, paths, weights=None, split="90,10", seq_length=16, n_samples=(10, 2, 0), **options):
    with pytest.raises(DataError, match=match):
        build_datasets(paths, weights, split, seq_length, 1, n_samples, **options)


def test_what_is_refused(tmp_path, corpora, make_dataset):
    refused("no dataset", [])
    refused(r"x.*no such file(.|\n)*y.*no such file", [corpora[0], tmp_path / "x", tmp_path / "y"])
    refused(r"data\.weights has 1 entries +must have one for each of the 3", corpora, [1.0])
    refused(r"data\.weights: 0 for .*d1 +must be above 0", corpora, [1.0, 0, 1.0])
    refused(r"data\.weights: nan for", corpora, [1.0, float("nan"), 1.0])
    refused(r"data\.split = '1,2,3,4' +must be one to three", corpora, split="1,2,3,4")
    refused(r"data\.split = '90,10' +test has no share", corpora, n_samples=(10, 2, 3))
    refused(
        r"900 samples are needed +the 3 datasets have \d+ in one epoch, .* set data\.weights",
        corpora,
        n_samples=(900, 2, 0),
    )
    refused("token id 256 in document", corpora, vocab_size=256)


def test_all_that_is_wrong_with_the_data_is_shown_at_once(tmp_path, corpora, make_dataset):
    tiny = make_dataset("tiny", [5, 6])
    with pytest.raises(DataError) as caught:
        build_datasets([*corpora, tiny], [1, 1, 1, 1], "90,10", 16, 1, (10, 2, 0), vocab_size=256)
    text = str(caught.value)
    assert "6 problems in the datasets" in text
    assert text.count("token id 256") == 4
    assert "tiny: train has 2 of 2 documents, 11 tokens" in text
    assert "tiny: valid has 0 of 2 documents, 0 tokens" in text
    assert not (tmp_path / "index_cache").exists()
