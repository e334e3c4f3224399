"""The .bin/.idx format: against megatron-core in both directions, round trips, and every way a file can be wrong."""

import pickle
import struct
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megascratch.data.indexed import DTYPES, HEADER, IndexedDataset, bin_path, idx_path, token_dtype
from megascratch.data.writer import IndexedDatasetWriter
from megascratch.errors import DataError

DOCUMENTS = [[[5, 6, 7]], [[8], [9, 9]], [], [[1]]]  # documents of sequences, one of them empty


def joined(lists: list[list]) -> list:
    return list(chain.from_iterable(lists))


def write(prefix: Path, documents=DOCUMENTS, dtype=np.uint16, **options) -> Path:
    with IndexedDatasetWriter(prefix, np.dtype(dtype), **options) as writer:
        for sequences in documents:
            writer.add_document(joined(sequences), [len(sequence) for sequence in sequences])
    return prefix


def read(prefix: Path) -> list[list[list[int]]]:
    dataset = IndexedDataset(prefix)
    marks = dataset.document_marks.tolist()
    return [[dataset[i].tolist() for i in range(a, b)] for a, b in pairwise(marks)]


def test_the_worked_example_of_the_module(tmp_path):
    write(tmp_path / "p", DOCUMENTS[:2])
    assert bin_path(tmp_path / "p").read_bytes().hex(" ") == "05 00 06 00 07 00 08 00 09 00 09 00"
    expected = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 3, 3)
    expected += struct.pack("<3i", 3, 1, 2) + struct.pack("<3q", 0, 6, 8) + struct.pack("<3q", 0, 1, 3)
    assert idx_path(tmp_path / "p").read_bytes() == expected


@pytest.mark.parametrize("dtype", [dtype.name for dtype in DTYPES.values()])
@pytest.mark.parametrize("modes", [False, True])
def test_same_bytes_as_megatron(tmp_path, megatron, dtype, modes):
    torch = pytest.importorskip("torch")
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    builder = megatron.indexed.IndexedDatasetBuilder(f"{theirs}.bin", getattr(np, dtype), multimodal=modes)
    with IndexedDatasetWriter(ours, np.dtype(dtype), with_modes=modes) as writer:
        for number, sequences in enumerate(DOCUMENTS):
            tokens, lengths = joined(sequences), [len(sequence) for sequence in sequences]
            builder.add_document(torch.tensor(tokens), lengths, [number] * len(lengths))
            writer.add_document(tokens, lengths, [number] * len(lengths))
    builder.finalize(f"{theirs}.idx")
    assert bin_path(ours).read_bytes() == bin_path(theirs).read_bytes()
    assert idx_path(ours).read_bytes() == idx_path(theirs).read_bytes()


@pytest.mark.parametrize("modes", [False, True])
def test_megatron_reads_ours_and_we_read_theirs(tmp_path, megatron, modes):
    torch = pytest.importorskip("torch")
    theirs = tmp_path / "theirs"
    builder = megatron.indexed.IndexedDatasetBuilder(f"{theirs}.bin", np.int32, multimodal=modes)
    for sequences in DOCUMENTS:
        for sequence in sequences:
            builder.add_item(torch.tensor(sequence), mode=len(sequence))
        builder.end_document()
    builder.finalize(f"{theirs}.idx")
    assert read(theirs) == DOCUMENTS
    if modes:
        assert IndexedDataset(theirs).modes.tolist() == [3, 1, 2, 1]

    read_back = megatron.indexed.IndexedDataset(str(write(tmp_path / "ours", dtype=np.int32)))
    assert [read_back[i].tolist() for i in range(len(read_back))] == [[5, 6, 7], [8], [9, 9], [1]]
    assert read_back.get(0, offset=1, length=2).tolist() == [6, 7]
    assert read_back.document_indices.tolist() == [0, 1, 3, 3, 4]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    documents=st.lists(st.lists(st.lists(st.integers(0, 65499), max_size=5), max_size=3), max_size=6),
    bulk=st.booleans(),
)
def test_round_trip(tmp_path_factory, documents, bulk):
    prefix = tmp_path_factory.mktemp("round") / "trip"
    if bulk:  # one sequence a document, and none in an empty one
        flat = [joined(sequences) for sequences in documents]
        with IndexedDatasetWriter(prefix, np.dtype(np.uint16)) as writer:
            np.array(joined(flat), np.uint16).tofile(tokens := prefix.with_name("tokens"))
            np.array([len(d) for d in flat], np.int64).tofile(lengths := prefix.with_name("lengths"))
            writer.add_files(tokens, lengths)
        documents = [[tokens] if tokens else [] for tokens in flat]
    else:
        write(prefix, documents)
    assert read(prefix) == documents
    dataset = IndexedDataset(prefix)
    assert dataset.contiguous
    assert dataset.n_tokens == sum(len(sequence) for sequences in documents for sequence in sequences)


def test_reading_parts(tmp_path):
    dataset = IndexedDataset(write(tmp_path / "p"))
    assert dataset.get(0, 1).tolist() == [6, 7]
    assert dataset.get(0, 1, 1).tolist() == [6]
    assert dataset.document(1).tolist() == [8, 9, 9]
    assert dataset.document(2).tolist() == []
    assert (dataset.n_documents, len(dataset), dataset.n_tokens) == (4, 4, 7)
    assert np.concatenate(list(dataset.token_blocks(3))).tolist() == [5, 6, 7, 8, 9, 9, 1]


def test_an_empty_dataset_opens(tmp_path):
    dataset = IndexedDataset(write(tmp_path / "p", []))
    assert (dataset.n_documents, len(dataset), dataset.n_tokens) == (0, 0, 0)


def test_pickling_carries_the_path_not_the_tokens(tmp_path):
    dataset = IndexedDataset(write(tmp_path / "p", [[list(range(5000))]]))
    pickled = pickle.dumps(dataset)
    assert len(pickled) < 1000
    assert np.array_equal(pickle.loads(pickled)[0], dataset[0])


def test_dtype_follows_megatrons_threshold(megatron):
    for vocab_size in (1, 65499, 65500, 65501, 200000):
        assert token_dtype(vocab_size) == megatron.indexed.DType.optimal_dtype(vocab_size)


# ---- files that are wrong ----


def damage(prefix: Path, offset: int, value: bytes) -> None:
    data = bytearray(idx_path(prefix).read_bytes())
    data[offset : offset + len(value)] = value
    idx_path(prefix).write_bytes(data)


def test_missing_files(tmp_path):
    with pytest.raises(DataError, match=r"p\.bin +no such file") as caught:
        IndexedDataset(tmp_path / "p")
    assert "p.idx" in str(caught.value)
    assert "without .bin and .idx" in str(caught.value)
    write(tmp_path / "p")
    idx_path(tmp_path / "p").unlink()
    with pytest.raises(DataError, match=r"p\.idx +no such file +a dataset is a \.bin and an \.idx"):
        IndexedDataset(tmp_path / "p")


def test_a_prefix_with_its_suffix(tmp_path):
    write(tmp_path / "p")
    with pytest.raises(DataError, match=r"give the prefix without \.bin"):
        IndexedDataset(tmp_path / "p.bin")


LENGTHS, POINTERS, MARKS = HEADER.size, HEADER.size + 4 * 4, HEADER.size + 4 * 4 + 4 * 8


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (0, b"TNTIDX\0\0\0", "an index starts with"),
        (9, struct.pack("<Q", 2), "version 2 +must be 1"),
        (17, b"\x09", r"dtype code 9 +must be one of 1 \(uint8\)"),
        (18, struct.pack("<Q", 5), "5 sequences and 5 marks take"),
        (18, struct.pack("<Q", 2**63), "truncated or damaged"),
        (26, struct.pack("<Q", 4), "4 marks take"),
        (LENGTHS, struct.pack("<i", -1), r"sequence 0 of 4 has -1 tokens"),
        (LENGTHS + 12, struct.pack("<i", 2), r"p\.bin has 14 bytes +sequence 3 of 4 has 2 tokens of uint16 at byte 12"),
        (POINTERS + 8, struct.pack("<q", -2), "sequence 1 of 4"),
        (POINTERS + 8, struct.pack("<q", 2**63 - 1), "sequence 1 of 4"),
        (MARKS, struct.pack("<q", 1), "must rise from 0 to the number of sequences, 4"),
        (MARKS + 8, struct.pack("<q", 9), "must rise from 0"),
        (MARKS + 32, struct.pack("<q", 3), "must rise from 0"),
    ],
)
def test_damaged_index(tmp_path, offset, value, message):
    prefix = write(tmp_path / "p")
    damage(prefix, offset, value)
    with pytest.raises(DataError, match=message):
        IndexedDataset(prefix)


@pytest.mark.parametrize("keep", [0, 5, 20, 33, 34, 60, 120])
def test_truncated_index(tmp_path, keep):
    prefix = write(tmp_path / "p")
    idx_path(prefix).write_bytes(idx_path(prefix).read_bytes()[:keep])
    with pytest.raises(DataError, match=r"p\.idx"):
        IndexedDataset(prefix)


def test_truncated_bin(tmp_path):
    prefix = write(tmp_path / "p")
    bin_path(prefix).write_bytes(bin_path(prefix).read_bytes()[:-1])
    with pytest.raises(DataError, match=r"p\.bin has 13 bytes .* truncated"):
        IndexedDataset(prefix)


# ---- writing ----


def test_nothing_is_overwritten_unless_asked(tmp_path):
    prefix = write(tmp_path / "p")
    before = bin_path(prefix).read_bytes()
    with pytest.raises(DataError, match="exists already"):
        write(prefix, [[[1]]])
    assert bin_path(prefix).read_bytes() == before
    write(prefix, [[[1]]], overwrite=True)
    assert read(prefix) == [[[1]]]


def test_a_dataset_that_another_process_finished_first_stays(tmp_path):
    writer = IndexedDatasetWriter(tmp_path / "p", np.dtype(np.uint16))
    write(tmp_path / "p")
    with pytest.raises(DataError, match="exists already"), writer:
        writer.add_document([1])
    assert read(tmp_path / "p") == DOCUMENTS


def test_a_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(DataError), IndexedDatasetWriter(tmp_path / "p", np.dtype(np.uint16)) as writer:
        writer.add_document([1, 70_000])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("token", [-1, 65536])
def test_tokens_that_do_not_fit_are_refused(tmp_path, token):
    with (
        pytest.raises(DataError, match=rf"token id {token} +uint16 holds 0 to 65535"),
        IndexedDatasetWriter(tmp_path / "p", np.dtype(np.uint16)) as writer,
    ):
        writer.add_document([1, token])


def test_missing_directory(tmp_path):
    with pytest.raises(DataError, match="no such directory"):
        write(tmp_path / "none" / "p")
