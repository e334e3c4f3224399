"""Merging and describing datasets."""

import shutil

import numpy as np
import pytest

from megascratch.data.describe import describe_dataset
from megascratch.data.indexed import IndexedDataset, bin_path, idx_path
from megascratch.data.merge import merge_datasets
from megascratch.data.writer import IndexedDatasetWriter
from megascratch.errors import DataError


def test_merging_gives_megatrons_bytes(tmp_path, quiet, megatron):
    prefixes = []
    for name, documents in (("a", [[[1, 2], [3]], []]), ("b", [[[4]]]), ("c", [])):
        prefixes.append(tmp_path / name)
        with IndexedDatasetWriter(prefixes[-1], np.dtype(np.int32), with_modes=True) as writer:
            for sequences in documents:
                lengths = [len(sequence) for sequence in sequences]
                writer.add_document([t for sequence in sequences for t in sequence], lengths, lengths)
    merged = merge_datasets(prefixes[:2], tmp_path / "m", console=quiet)
    assert [merged.document(i).tolist() for i in range(merged.n_documents)] == [[1, 2, 3], [], [4]]
    assert merged.modes.tolist() == [2, 1, 1]

    builder = megatron.indexed.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), np.int32, multimodal=True)
    for prefix in prefixes[:2]:
        builder.add_index(str(prefix))
    builder.finalize(str(tmp_path / "theirs.idx"))
    assert bin_path(tmp_path / "m").read_bytes() == (tmp_path / "theirs.bin").read_bytes()
    assert idx_path(tmp_path / "m").read_bytes() == (tmp_path / "theirs.idx").read_bytes()
    assert merge_datasets(prefixes, tmp_path / "with_empty", console=quiet).n_tokens == 4


def test_merging_sequences_that_are_not_contiguous(tmp_path, quiet, make_dataset):
    """An index may pick its sequences from anywhere in the .bin, as filtered corpora do."""
    source = IndexedDataset(make_dataset("a", [3, 4, 5]))
    sequences = [source[i].copy() for i in range(3)]
    index = bytearray(idx_path(source.prefix).read_bytes())
    lengths, pointers = source.lengths[::-1].tobytes(), source.pointers[::-1].tobytes()
    index[34 : 34 + len(lengths) + len(pointers)] = lengths + pointers
    idx_path(source.prefix).write_bytes(index)

    assert not IndexedDataset(source.prefix).contiguous
    merged = merge_datasets([source.prefix], tmp_path / "m", console=quiet)
    assert merged.contiguous
    for i in range(3):
        assert np.array_equal(merged[i], sequences[2 - i])


def test_what_merging_refuses(tmp_path, quiet, make_dataset):
    a, b, wide = make_dataset("a", [3]), make_dataset("b", [3]), make_dataset("wide", [3], vocab_size=70_000)

    def refused(match, prefixes, output=tmp_path / "m"):
        with pytest.raises(DataError, match=match):
            merge_datasets(prefixes, output, console=quiet)

    refused("dtype int32 +must be uint16, as in the first dataset", [a, wide])
    refused("no dataset", [])
    refused("is also an input", [a, b], b)
    refused(r"x.*no such file(.|\n)*y.*no such file", [a, tmp_path / "x", tmp_path / "y"])
    with IndexedDatasetWriter(tmp_path / "modes", np.dtype(np.uint16), with_modes=True) as writer:
        writer.add_document([1])
    refused("has modes +the first dataset has none", [a, tmp_path / "modes"])
    shutil.copy(bin_path(a), tmp_path / "m.bin")
    refused(r"m\.bin +exists already", [a, b])


def test_describing(tmp_path, tokenizer):
    with IndexedDatasetWriter(tmp_path / "p", np.dtype(np.uint16)) as writer:
        for text in ("one", "", "three", "seven77"):
            writer.add_document(list(text.encode()))
    described = describe_dataset(tmp_path / "p", tokenizer, n_documents=3, n_tokens=4)
    assert (described.n_documents, described.n_sequences, described.n_tokens) == (4, 3, 15)
    assert (described.dtype, described.has_modes) == ("uint16", False)
    assert (described.bin_bytes, described.idx_bytes) == (30, 34 + 3 * 12 + 5 * 8)
    assert described.length_quantiles[0.0] == 3
    assert described.length_quantiles[0.5] == 5
    assert described.length_quantiles[1.0] == 7
    assert [start.text for start in described.starts] == ["one", "", "thre"]
    assert [start.n_tokens for start in described.starts] == [3, 0, 5]
    assert describe_dataset(tmp_path / "p").starts[0].text is None
