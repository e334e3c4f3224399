"""Preprocessing: what is written, for every compression and worker count, and what every bad input says."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from megascratch.data import corpus
from megascratch.data.indexed import IndexedDataset, bin_path, idx_path
from megascratch.data.preprocess import preprocess
from megascratch.errors import DataError, MissingDependency
from megascratch.tokenizer import train_from_texts

EOD = 256
TEXTS = ["hello", "", "zweite Zeile: äöü\nand more", "日本語", "x" * 3000] * 40


def write_jsonl(path: Path, texts, key="text") -> Path:
    path.write_text("".join(json.dumps({key: text, "n": 1}) + "\n" for text in texts))
    return path


def documents(prefix: Path) -> list[list[int]]:
    dataset = IndexedDataset(prefix)
    return [dataset.document(i).tolist() for i in range(dataset.n_documents)]


def expected(texts, eod=True) -> list[list[int]]:
    return [[*text.encode(), EOD] if eod and text else list(text.encode()) for text in texts]


def test_with_our_own_tokenizer(tmp_path, quiet):
    tokenizer = train_from_texts([text for text in TEXTS if text], 300, console=quiet)
    texts = [*TEXTS[:5], "<|endoftext|>", "\ud800 alone"]
    file = write_jsonl(tmp_path / "a.jsonl", texts)
    for workers in (1, 2):
        preprocess([file], tokenizer, tmp_path / f"w{workers}", append_eod=True, workers=workers, console=quiet)
        written = documents(tmp_path / f"w{workers}_text_document")
        assert written == [[*tokenizer.encode(text), tokenizer.eod_id] if text else [] for text in texts]
    decoded = [tokenizer.decode(ids, skip_special=True) for ids in written]
    assert decoded == [*texts[:6], "\ufffd alone"]


@pytest.mark.parametrize("append_eod", [False, True])
def test_documents_in_order(tmp_path, tokenizer, quiet, append_eod):
    file = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    summary = preprocess([file], tokenizer, tmp_path / "out", append_eod=append_eod, console=quiet)
    assert documents(tmp_path / "out_text_document") == expected(TEXTS, append_eod)
    assert IndexedDataset(tmp_path / "out_text_document").dtype == np.uint16
    assert summary.prefixes == {"text": tmp_path / "out_text_document"}
    assert summary.n_documents == len(TEXTS)
    assert summary.n_tokens == {"text": sum(map(len, expected(TEXTS, append_eod)))}
    assert summary.n_text_bytes == file.stat().st_size
    assert summary.n_bad_lines == {}
    assert summary.documents_per_s > 0
    assert summary.text_bytes_per_s > 0


def test_same_bytes_as_megatrons_builder(tmp_path, tokenizer, quiet, megatron):
    """Megatron's tool adds each document with the lengths of its non-empty sentences; an empty one has none."""
    preprocess([write_jsonl(tmp_path / "a.jsonl", TEXTS)], tokenizer, tmp_path / "out", append_eod=True, console=quiet)
    builder = megatron.indexed.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), np.uint16)
    for ids in expected(TEXTS):
        builder.add_document(ids, [len(ids)] if ids else [])
    builder.finalize(str(tmp_path / "theirs.idx"))
    ours = tmp_path / "out_text_document"
    assert bin_path(ours).read_bytes() == (tmp_path / "theirs.bin").read_bytes()
    assert idx_path(ours).read_bytes() == (tmp_path / "theirs.idx").read_bytes()


def test_any_number_of_workers_writes_the_same_bytes(tmp_path, tokenizer, quiet, small_parts):
    files = [write_jsonl(tmp_path / f"{name}.jsonl", TEXTS) for name in "ab"]
    for workers in (1, 2, 5):
        preprocess(files, tokenizer, tmp_path / f"w{workers}", append_eod=True, workers=workers, console=quiet)
    for path in (bin_path, idx_path):
        one, two, five = (path(tmp_path / f"w{workers}_text_document").read_bytes() for workers in (1, 2, 5))
        assert one == two == five
    assert documents(tmp_path / "w1_text_document") == expected(TEXTS * 2)


def compress_gz(data: bytes) -> bytes:
    half = len(data) // 2
    return gzip.compress(data[:half]) + gzip.compress(data[half:])  # two members, as `cat a.gz b.gz` makes


def compress_zst(data: bytes) -> bytes:
    zstandard = pytest.importorskip("zstandard")
    half = len(data) // 2
    skippable = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"  # a frame of no data, as pzstd writes
    frames = [zstandard.ZstdCompressor().compress(part) for part in (data[:half], data[half:])]
    return frames[0] + skippable + frames[1]


@pytest.mark.parametrize(("suffix", "compress"), [(".gz", compress_gz), (".zst", compress_zst)])
def test_compressed_input(tmp_path, tokenizer, quiet, suffix, compress):
    plain = write_jsonl(tmp_path / "a.jsonl", TEXTS).read_bytes()
    file = tmp_path / f"a.jsonl{suffix}"
    file.write_bytes(compress(plain))
    preprocess([file], tokenizer, tmp_path / "out", append_eod=True, console=quiet)
    assert documents(tmp_path / "out_text_document") == expected(TEXTS)


@pytest.mark.parametrize(("suffix", "compress"), [(".gz", compress_gz), (".zst", compress_zst)])
@pytest.mark.parametrize("how", ["truncated", "garbage"])
def test_damaged_compressed_input(tmp_path, tokenizer, quiet, suffix, compress, how):
    data = compress(write_jsonl(tmp_path / "a.jsonl", TEXTS).read_bytes())
    file = tmp_path / f"a.jsonl{suffix}"
    file.write_bytes(data[:-6] if how == "truncated" else b"not compressed at all")
    with pytest.raises(DataError, match=r"cannot be decompressed: .* the file is damaged or truncated"):
        preprocess([file], tokenizer, tmp_path / "out", console=quiet)
    assert not list(tmp_path.glob("out*"))


def test_zst_without_a_package(tmp_path, tokenizer, quiet, monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(corpus.importlib, "import_module", missing)
    (tmp_path / "a.jsonl.zst").write_bytes(b"")
    with pytest.raises(MissingDependency, match=r"pip install 'megascratch\[zstd\]'"):
        preprocess([tmp_path / "a.jsonl.zst"], tokenizer, tmp_path / "out", console=quiet)


def test_several_keys(tmp_path, tokenizer, quiet):
    lines = [{"title": "a", "body": "bb"}, {"title": "", "body": "c"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    summary = preprocess([tmp_path / "a.jsonl"], tokenizer, tmp_path / "o", json_keys=("title", "body"), console=quiet)
    assert documents(tmp_path / "o_title_document") == [[97], []]
    assert documents(tmp_path / "o_body_document") == [[98, 98], [99]]
    assert summary.n_tokens == {"title": 1, "body": 3}


def test_windows_line_ends_blank_lines_and_byte_order_mark(tmp_path, tokenizer, quiet):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n   \n{"text": "b"}')
    preprocess([tmp_path / "a.jsonl"], tokenizer, tmp_path / "o", console=quiet)
    assert documents(tmp_path / "o_text_document") == [[97], [98]]


BAD_LINES = [
    (b'{"text": "a"', r"not JSON: Expecting ',' delimiter at column 13"),
    (b'{"text": "\xff"}', "not UTF-8 at byte 10"),
    (b'["text"]', "not a JSON object: list"),
    (b'{"txt": "a"}', 'no key "text"'),
    (b'{"text": ["a"]}', '"text" is not a string: list'),
    (b"[" * 200_000, "not JSON: "),
    (b"1" * 5000, "not JSON: Exceeds the limit"),
]


@pytest.mark.parametrize(("bad", "reason"), BAD_LINES)
def test_bad_lines(tmp_path, tokenizer, quiet, bad, reason):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n\n' + bad + b'\n{"text": "b"}\n')
    file, prefix = tmp_path / "a.jsonl", tmp_path / "o"
    with pytest.raises(DataError, match=rf"a\.jsonl\n +line 3 +{reason}.*add --on-error skip --resume"):
        preprocess([file], tokenizer, prefix, console=quiet)
    assert not list(tmp_path.glob("o_*"))

    summary = preprocess([file], tokenizer, prefix, on_error="skip", resume=True, console=quiet)
    assert not list(tmp_path.glob("o.parts"))
    assert documents(tmp_path / "o_text_document") == [[97], [98]]
    assert summary.n_bad_lines == {tmp_path / "a.jsonl": 1}
    assert str(summary.bad_lines[0]).startswith(f"{tmp_path / 'a.jsonl'}:3: {reason[:8]}")


def test_many_bad_lines_are_counted_and_the_first_shown(tmp_path, tokenizer, quiet):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' + "x\n" * 500)
    summary = preprocess([tmp_path / "a.jsonl"], tokenizer, tmp_path / "o", on_error="skip", console=quiet)
    assert summary.n_bad_lines == {tmp_path / "a.jsonl": 500}
    assert [bad.line for bad in summary.bad_lines] == list(range(2, 22))


@pytest.mark.parametrize("content", ["", "\n\n", "x\n"])
def test_no_documents(tmp_path, tokenizer, quiet, content):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(DataError, match=f"no document in 1 files, {content.count('x')} bad lines"):
        preprocess([tmp_path / "a.jsonl"], tokenizer, tmp_path / "o", on_error="skip", console=quiet)
    assert not list(tmp_path.glob("o_*"))


def test_everything_is_checked_before_work(tmp_path, tokenizer, quiet):
    file = write_jsonl(tmp_path / "a.jsonl", TEXTS)

    def refused(match, inputs=(file,), **options):
        with pytest.raises(DataError, match=match):
            preprocess(inputs, tokenizer, tmp_path / "o", console=quiet, **options)

    refused(r"b\.jsonl +no such file or directory.*\n.*c\.jsonl", [file, tmp_path / "b.jsonl", tmp_path / "c.jsonl"])
    refused("is a directory", [tmp_path])
    refused("no input file", [])
    refused("json key text +is given 2 times", json_keys=("text", "text"))
    refused("json key 'a/b' +becomes part of a file name", json_keys=("a/b",))
    refused("no json key", json_keys=())
    refused("workers = 0 +must be at least 1", workers=0)
    tokenizer.eod_id = None
    refused("the tokenizer has no end-of-document token", append_eod=True)
    assert sorted(tmp_path.iterdir()) == [file]


def test_all_that_is_wrong_is_shown_at_once(tmp_path, tokenizer, quiet):
    (tmp_path / "o_text_document.bin").write_text("mine")
    with pytest.raises(DataError, match="3 problems in the input and the options") as caught:
        preprocess([tmp_path / "none.jsonl"], tokenizer, tmp_path / "o", workers=0, console=quiet)
    for part in ("none.jsonl", "workers = 0", "o_text_document.bin"):
        assert part in str(caught.value)


def test_nothing_is_overwritten(tmp_path, tokenizer, quiet):
    file = write_jsonl(tmp_path / "a.jsonl", ["a"])
    (tmp_path / "o_text_document.idx").write_text("mine")
    with pytest.raises(DataError, match=r"o_text_document\.idx +exists already"):
        preprocess([file], tokenizer, tmp_path / "o", console=quiet)
    assert (tmp_path / "o_text_document.idx").read_text() == "mine"
    preprocess([file], tokenizer, tmp_path / "o", overwrite=True, console=quiet)
    assert documents(tmp_path / "o_text_document") == [[97]]


def test_a_fatal_line_found_by_a_worker(tmp_path, tokenizer, quiet, small_parts):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' * 500 + "x\n" + '{"text": "a"}\n' * 500 + "y\n")
    with pytest.raises(DataError, match="line 501 "):
        preprocess([tmp_path / "a.jsonl"], tokenizer, tmp_path / "o", workers=3, console=quiet)
    assert not list(tmp_path.glob("o_*"))
