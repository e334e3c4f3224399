"""GPT samples: identical to megatron-core's for identical seeds, in every option, and what is refused."""

import multiprocessing
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megascratch.data import samples
from megascratch.data._sample_index import fill_sample_index
from megascratch.data.indexed import IndexedDataset
from megascratch.data.samples import EodRules, GPTDataset, build_sample_indices, require_one_sample
from megascratch.data.splits import SPLITS, split_ranges
from megascratch.data.token_ids import check_token_ids
from megascratch.data.writer import IndexedDatasetWriter
from megascratch.errors import DataError

EOD = 256
LENGTHS = np.random.default_rng(0).integers(0, 60, 120).tolist()


def megatron_tokenizer():
    return SimpleNamespace(eod=EOD, vocab_size=257, unique_identifiers={"class": "bytes"})


def megatron_dataset(megatron, prefix, seq_length, n_samples, split, part, seed, cache, **options):
    options = {"reset_position_ids": False, "reset_attention_mask": False, "eod_mask_loss": False, **options}
    config = megatron.gpt.GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_length,
        blend=([str(prefix)], None),
        split=split,
        path_to_cache=str(cache),
        tokenizer=megatron_tokenizer(),
        create_attention_mask=False,
        **options,
    )
    sizes = [None, None, None]
    sizes[part] = n_samples
    builder = megatron.builder.BlendedMegatronDatasetBuilder(megatron.gpt.GPTDataset, sizes, lambda: True, config)
    return builder.build()[part]


def our_dataset(prefix, seq_length, n_samples, split, part, seed, cache, rules=None, vocab_size=None) -> GPTDataset:
    indexed = IndexedDataset(prefix)
    sequences = split_ranges(split, len(indexed))[part]
    return GPTDataset(indexed, sequences, seq_length, n_samples, seed, Path(cache), rules, vocab_size)


def assert_same_samples(ours, theirs):
    assert len(ours) == len(theirs)
    for i in range(len(ours)):
        expected, sample = theirs[i], ours[i]
        for key in ("tokens", "labels", "loss_mask", "position_ids"):
            value = getattr(sample, key)
            assert np.array_equal(value, expected[key].numpy()), (i, key)
            assert value.dtype == expected[key].numpy().dtype


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("seq_length", "n_samples", "split", "part", "seed"),
    [
        (16, None, "100", 0, 1234),  # one epoch, as much as there is
        (16, 5, "100", 0, 1234),  # less than an epoch
        (16, 400, "969,30,1", 0, 1234),  # several; the final one apart
        (16, 230, "90,10", 0, 7),
        (7, 1000, "80,10,10", 1, 42),
        (7, 333, "80,10,10", 2, 42),
        (64, 200, "99,1,0", 0, 3),  # samples over many documents
        (1, 90, "50,50", 1, 0),
        (200, 17, "0.7,0.3", 0, 5),
    ],
)
def test_samples_of_megatron(tmp_path, megatron, make_dataset, seq_length, n_samples, split, part, seed):
    prefix = make_dataset("d", LENGTHS)
    theirs = megatron_dataset(megatron, prefix, seq_length, n_samples, split, part, seed, tmp_path / "theirs")
    ours = our_dataset(prefix, seq_length, n_samples, split, part, seed, tmp_path / "ours")
    for index in ("document_index", "sample_index", "shuffle_index"):
        assert np.array_equal(getattr(ours, index), getattr(theirs, index)), index
        assert getattr(ours, index).dtype == getattr(theirs, index).dtype
    assert_same_samples(ours, theirs)


@pytest.mark.filterwarnings("ignore")
def test_final_epochs_of_every_size(tmp_path, megatron, make_dataset):
    """Around the 80 % threshold, and around whole epochs, the final epoch is apart exactly when Megatron's is."""
    prefix = make_dataset("d", LENGTHS[:40])
    tokens = sum(LENGTHS[:40])
    per_epoch = (tokens - 1) // 8
    apart = set()
    for n_samples in {*range(2 * per_epoch - 3, 2 * per_epoch + 6), *range(per_epoch, 3 * per_epoch, 11)}:
        theirs = megatron_dataset(megatron, prefix, 8, n_samples, "1", 0, 1, tmp_path / "theirs")
        ours = build_sample_indices(IndexedDataset(prefix).lengths, range(40), 8, n_samples, 1)
        for index, values in ours.items():
            assert np.array_equal(values, getattr(theirs, index)), (n_samples, index)
        apart.add(int(ours["shuffle_index"][: per_epoch - 1].max()) < len(ours["shuffle_index"]) - per_epoch // 2)
    assert apart == {True, False}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("eod_mask_loss", [False, True])
@pytest.mark.parametrize("reset_position_ids", [False, True])
def test_masks_and_positions_of_megatron(tmp_path, megatron, make_dataset, eod_mask_loss, reset_position_ids):
    prefix = make_dataset("d", [1, 2, 3, 1, 9, 40, 1, 1])
    theirs = megatron_dataset(
        megatron,
        prefix,
        6,
        30,
        "1",
        0,
        1,
        tmp_path / "theirs",
        eod_mask_loss=eod_mask_loss,
        reset_position_ids=reset_position_ids,
    )
    rules = EodRules(EOD, eod_mask_loss, reset_position_ids)
    assert_same_samples(our_dataset(prefix, 6, 30, "1", 0, 1, tmp_path / "ours", rules), theirs)


def test_the_worked_example_of_the_module():
    sample_index = np.empty((5, 2), np.int32)
    fill_sample_index(np.array([3, 2, 4], np.int32), np.array([2, 0, 1], np.int32), 2, sample_index)
    assert sample_index.tolist() == [[0, 0], [0, 2], [1, 0], [1, 2], [2, 1]]


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(lambda lengths: sum(lengths) > 1),
    seq_length=st.integers(1, 12),
    epochs=st.integers(1, 3),
    wide=st.booleans(),
)
def test_sample_index_of_megatron(megatron, lengths, seq_length, epochs, wide):
    documents = np.random.default_rng(0).permutation(np.tile(np.arange(len(lengths), dtype=np.int32), epochs))
    sizes = np.array(lengths, np.int32)
    expected = megatron.helpers.build_sample_idx(sizes, documents, seq_length, epochs, sum(lengths), True, True)
    ours = np.empty((len(expected), 2), np.int64 if wide else np.int32)
    fill_sample_index(sizes, documents, seq_length, ours)
    assert np.array_equal(ours, expected)


def test_the_sample_index_builder_trusts_nobody():
    sizes, rows = np.array([3, 2], np.int32), np.empty((4, 2), np.int32)
    for documents in ([0], [0, 2], [0, -1]):
        with pytest.raises(ValueError, match="too few tokens or an unknown document"):
            fill_sample_index(sizes, np.array(documents, np.int32), 2, rows)
    with pytest.raises(ValueError, match="seq_length must be positive"):
        fill_sample_index(sizes, np.array([0], np.int32), 0, rows)
    with pytest.raises(TypeError):
        fill_sample_index(sizes.astype(np.int64), np.array([0], np.int32), 2, rows)


def test_the_whole_epoch_is_read_once_in_order(make_dataset, tmp_path):
    prefix = make_dataset("d", LENGTHS)
    ours = our_dataset(prefix, 16, None, "1", 0, 9, tmp_path / "cache")
    stream = np.concatenate([ours.indexed[i] for i in ours.document_index])
    unshuffled = np.argsort(ours.shuffle_index)
    for k, i in enumerate(unshuffled.tolist()):
        assert np.array_equal(ours[i].text, stream[k * 16 : k * 16 + 17])
    with pytest.raises(IndexError):
        ours[len(ours)]
    with pytest.raises(IndexError):
        ours[-1]


# ---- the cache ----


def test_the_second_build_reads_the_cache(make_dataset, tmp_path, monkeypatch):
    prefix = make_dataset("d", LENGTHS)
    first = our_dataset(prefix, 16, 50, "1", 0, 9, tmp_path / "cache")
    monkeypatch.setattr("megascratch.data.samples.build_sample_indices", None)
    second = our_dataset(prefix, 16, 50, "1", 0, 9, tmp_path / "cache")
    assert isinstance(second.shuffle_index, np.memmap)
    assert np.array_equal(first.shuffle_index, second.shuffle_index)
    assert len(list((tmp_path / "cache").glob("*.json"))) == 1


def test_other_data_under_the_same_name_is_not_taken_from_the_cache(make_dataset, tmp_path):
    """Same path, same number of documents, same tokens, same sizes: only the lengths moved."""
    sums = []
    for lengths in ([10, 20, 30], [30, 20, 10]):
        for path in tmp_path.glob("d.*"):
            path.unlink()
        dataset = our_dataset(make_dataset("d", lengths), 8, None, "1", 0, 9, tmp_path / "cache")
        sums.append(dataset.sample_index.sum())
        dataset[len(dataset) - 1]
    assert len(list((tmp_path / "cache").glob("*.json"))) == 2
    assert sums[0] != sums[1]


def test_each_setting_has_its_own_cache_entry(make_dataset, tmp_path):
    prefix = make_dataset("d", LENGTHS)
    settings = [
        (16, 50, "1", 0, 9),
        (17, 50, "1", 0, 9),
        (16, 300, "1", 0, 9),
        (16, 50, "1", 0, 8),
        (16, 50, "9,1", 0, 9),
    ]
    for setting in settings * 2:
        shared = our_dataset(prefix, *setting, tmp_path / "cache")
        alone = our_dataset(prefix, *setting, tmp_path / f"{settings.index(setting)}")
        for index in ("document_index", "sample_index", "shuffle_index"):
            assert np.array_equal(getattr(shared, index), getattr(alone, index)), (setting, index)
    assert len(list((tmp_path / "cache").glob("*.json"))) == len(settings)


def build_at(barrier, prefix, cache, results):
    def counted(*arguments):
        with (cache.parent / "builds").open("a") as builds:
            builds.write("x")
        time.sleep(0.1)
        return build_sample_indices(*arguments)

    samples.build_sample_indices = counted  # in this forked process alone
    barrier.wait()
    dataset = our_dataset(prefix, 16, 4000, "1", 0, 9, cache)
    results.put([int(dataset[i].text.sum()) for i in range(0, len(dataset), 37)])


def test_of_many_ranks_that_start_at_once_one_builds(make_dataset, tmp_path):
    prefix = make_dataset("d", LENGTHS)
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(4), context.SimpleQueue()
    ranks = [context.Process(target=build_at, args=(barrier, prefix, tmp_path / "cache", results)) for _ in range(4)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(timeout=60)
        assert rank.exitcode == 0
    sums = [results.get() for _ in ranks]
    assert all(of_rank == sums[0] for of_rank in sums)
    assert (tmp_path / "builds").read_text() == "x"
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) == [".json", ".npy", ".npy", ".npy"]


def test_a_damaged_cache_file(make_dataset, tmp_path):
    prefix = make_dataset("d", LENGTHS)
    our_dataset(prefix, 16, 50, "1", 0, 9, tmp_path / "cache")
    next((tmp_path / "cache").glob("*shuffle_index.npy")).write_bytes(b"\x93NUMPY broken")
    with pytest.raises(DataError, match=r"is damaged: .* delete the file"):
        our_dataset(prefix, 16, 50, "1", 0, 9, tmp_path / "cache")


def test_a_cache_that_cannot_be_written(make_dataset, tmp_path):
    prefix = make_dataset("d", LENGTHS)
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DataError, match=r"cannot be written: .* set data\.cache_dir"):
        our_dataset(prefix, 16, 50, "1", 0, 9, tmp_path / "cache")


# ---- what is refused ----


def test_not_enough_for_one_sample(make_dataset):
    indexed = IndexedDataset(make_dataset("d", [4, 4, 8]))
    require_one_sample(indexed, range(2), 7, "valid")
    with pytest.raises(DataError, match=r"valid has 2 of 3 documents, 8 tokens +not enough for one sample .* = 9 tok"):
        require_one_sample(indexed, range(2), 8, "valid")


def test_token_ids_outside_the_vocabulary(make_dataset, tmp_path):
    prefix = make_dataset("d", [3, 4, 5])  # every document ends with 256
    indexed = IndexedDataset(prefix)
    check_token_ids(indexed, 257)
    message = r"d\.bin\n +token id 256 in document 0 +must be 0 to 255, as model\.vocab_size = 256"
    with pytest.raises(DataError, match=message):
        check_token_ids(indexed, 256)
    checked = our_dataset(prefix, 3, None, "1", 0, 1, tmp_path / "cache", vocab_size=256)
    unchecked = our_dataset(prefix, 3, None, "1", 0, 1, tmp_path / "cache")
    for i in range(len(checked)):
        if unchecked[i].text.max() < 256:
            assert np.array_equal(checked[i].text, unchecked[i].text)
            continue
        with pytest.raises(DataError, match=rf"token id 256 in document \d, read as sample {i} "):
            checked[i]


def test_the_right_document_is_named(make_dataset, tmp_path):
    with IndexedDatasetWriter(tmp_path / "p", np.dtype(np.int32)) as writer:
        for document in ([1, 2], [], [3, 4, -5], [6, 7]):
            writer.add_document(document)
    indexed = IndexedDataset(tmp_path / "p")
    with pytest.raises(DataError, match="token id -5 in document 2 "):
        check_token_ids(indexed, 100)
    whole = GPTDataset(indexed, range(3), 6, None, 0, tmp_path / "cache", vocab_size=100)
    with pytest.raises(DataError, match=r"token id -5 in document 2, read as sample 0 "):
        whole[0]


def test_tokens_that_are_not_whole_numbers(tmp_path):
    with IndexedDatasetWriter(tmp_path / "p", np.dtype(np.float32)) as writer:
        writer.add_document([1.5])
    with pytest.raises(DataError, match=r"tokens are float32 +token ids are whole numbers"):
        check_token_ids(IndexedDataset(tmp_path / "p"), None)


@pytest.mark.parametrize(("mask", "reset", "option"), [(True, False, "eod_mask_loss"), (False, True, "reset_pos")])
def test_eod_rules_need_an_eod(mask, reset, option):
    with pytest.raises(DataError, match=rf"data\.{option}.* needs an end-of-document token"):
        EodRules(None, mask, reset)


# ---- splits ----


@settings(max_examples=200, deadline=None)
@given(
    weights=st.lists(
        st.one_of(st.integers(0, 1000), st.floats(0, 100).map(lambda x: round(x, 3))), min_size=1, max_size=3
    ),
    n=st.integers(0, 10_000_000),
)
def test_splits_of_megatron(megatron, weights, n):
    from megatron.core.datasets import blended_megatron_dataset_config as config

    split = ",".join(map(str, weights))
    if sum(weights) <= 0:
        with pytest.raises(DataError, match="must be one to three weights"):
            split_ranges(split, n)
        return
    matrix = config.convert_split_vector_to_split_matrix(config.parse_and_normalize_split(split))
    expected = [
        None if ends is None else range(round(ends[0] * float(n)), round(ends[1] * float(n))) for ends in matrix
    ]
    assert list(split_ranges(split, n)) == expected


@pytest.mark.parametrize("split", ["", "0,0", "1,2,3,4", "-1,2", "a", "1.2.3"])
def test_impossible_splits(split):
    with pytest.raises(DataError, match=r"data\.split = .* must be one to three weights"):
        split_ranges(split, 100)


def test_split_names():
    assert SPLITS == ("train", "valid", "test")
