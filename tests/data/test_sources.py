"""JSON Lines in C++ against Python's json, and every other format that turns into texts."""

import json
import random
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from megascratch.data import sources
from megascratch.data._jsonl import pack
from megascratch.data.corpus import Limits
from megascratch.data.indexed import IndexedDataset
from megascratch.data.preprocess import preprocess
from megascratch.data.sources import batch_of_lines, parse_line
from megascratch.errors import DataError, MissingDependency
from megascratch.tokenizer.patterns import well_formed

FRAGMENTS = [
    *(b"{", b"}", b"[", b"]", b":", b",", b" ", b"\t", b"\r", b"\x0b", b'"', b"\\", b"\xef\xbb\xbf"),
    *(b'"text"', b'"te\\u0078t"', b'"key"', b'{"text":', b'{"key": "v", "text": "', b'"}', b'\\"', b"\\u12"),
    *(
        b'"a\\n\\/\\b\\f"',
        b'"\\ud83d\\ude00"',
        b'"\\ud800"',
        b'"\\udc00\\ud800"',
        b'"\\udc00\\udc00"',
        b'"\\ud800\\u0041"',
        b'"\\u0000"',
    ),
    *(b"0", b"01", b"-", b"-0.5e+3", b"1.", b".5", b"1e5", b"2" * 5000, b"NaN", b"-Infinity", b"null", b"true", b"nul"),
    *(
        b'"\xff"',
        b'"\xc3\xa9"',
        b'"\xc0\x80"',
        b'"\xe0\x80\x80"',
        b'"\xed\xa0\x80"',
        b'"\xf4\x90\x80\x80"',
        b'"\xe2\x82',
    ),
    *(b'"\x01"', b'"\x7f"', b'"\\x"', b'"\xf0\x9f\x98\x80 and enough text for whole words"', b"[" * 150, b"]" * 150),
]
VALUES = [
    "a",
    "é" * 9,
    "\U0001f600\n",
    "x" * 30 + '"\\',
    1,
    1.5,
    None,
    [1, {"text": "b"}],
    {"a": "b"},
    "\x00\x1f\x7f\u2028",
]


def random_line(rng: random.Random) -> bytes:
    """Fragments of JSON in any order, or a good line with a few bytes changed."""
    if rng.random() < 0.5:
        return b"".join(rng.choices(FRAGMENTS, k=rng.randint(1, 14)))
    values = {rng.choice(["text", "key", "other"]): rng.choice(VALUES) for _ in range(rng.randint(0, 3))}
    line = bytearray(json.dumps(values | {"text": rng.choice(VALUES[:4])}, ensure_ascii=rng.random() < 0.5).encode())
    for _ in range(rng.choice([0, 0, 1, 2])):
        at = rng.randrange(len(line))
        line[at : at + rng.randint(0, 1)] = rng.choice([rng.choice(FRAGMENTS), rng.randbytes(1), b""])
    return bytes(line).replace(b"\n", b"")


def with_json(lines: Sequence[bytes], keys: Sequence[str]) -> tuple[list[list[bytes]], list[tuple[int, str]]]:
    """What Python's json makes of the same lines: the strings of each key, and the bad lines."""
    texts: list[list[bytes]] = [[] for _ in keys]
    bad_lines = []
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            values = parse_line(line, keys)
        except ValueError as error:
            bad_lines.append((number, str(error)))
            continue
        for of_key, value in zip(texts, values):
            of_key.append(well_formed(value).encode())
    return texts, bad_lines


def strings(texts: sources.Texts) -> list[bytes]:
    bounds = [0, *texts.ends.tolist()]
    return [texts.utf8[begin:end].tobytes() for begin, end in pairwise(bounds)]


@pytest.mark.parametrize("keys", [["text"], ["text", "key"], ["kéy", "te\u0000xt", "text"]])
def test_the_parser_agrees_with_pythons_json(keys):
    """Also after a bad line: what was written of it must be gone. A longer run of the same: 2.1 million lines."""
    rng = random.Random(len(keys))
    lines = [random_line(rng) for _ in range(20_000)]
    lines += [json.dumps({key: f"{key}{n}" for key in keys}, ensure_ascii=n % 2 == 0).encode() for n in range(100)]
    rng.shuffle(lines)
    batch = batch_of_lines(b"\n".join(lines), keys)
    texts, bad_lines = with_json(lines, keys)
    assert [strings(one) for one in batch.by_key] == texts
    assert batch.bad_lines == bad_lines
    assert batch.n_lines == len(lines)
    assert len(texts[0]) >= 100
    assert len(bad_lines) >= 1000


def test_every_fragment_as_a_value():
    """Alone, in front of and behind others, where the parser reads it and where it only passes over it."""
    frames = [
        (b'{"text": ', b"}"),
        (b'{"n": [0, ', b'], "text": "a"}'),
        (b'{"text": "a"}', b""),
        (b'{"a": "b", ', b"}"),
    ]
    wrong_utf8 = [b'"%s"' % bytes([lead, *rest]) for lead in range(0x80, 256) for rest in ([], [0x80], [0x9F, 0x80])]
    wide = [
        b'"%s"' % bytes([lead, second, 0xBF, 0xBF][:size])
        for lead, size in ((0xE0, 3), (0xED, 3), (0xF0, 4), (0xF4, 4))
        for second in range(0x7F, 0xC1)
    ]
    escapes = [rb'"\%c"' % byte for byte in range(256) if byte != 10]
    for before, behind in frames:
        lines = [before + value + behind for value in [*FRAGMENTS, *wrong_utf8, *wide, *escapes]]
        batch = batch_of_lines(b"\n".join(lines), ["text"])
        texts, bad_lines = with_json(lines, ["text"])
        assert [strings(one) for one in batch.by_key] == texts
        assert batch.bad_lines == bad_lines


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (rb'{"text": "\ud83d\ude00\u00e9\u0000\u20ac"}', "😀é\0€"),
        (rb'{"text": "first", "text": "last"}', "last"),
        (rb'{"text": 1, "text": "last"}', "last"),
        (rb'{"te\u0078t": "escaped key"}', "escaped key"),
        (b'{"meta": {"text": [{"text": "inner"}]}, "text": "outer"} \r', "outer"),
        (rb'{"text": "\ud800 alone", "n": NaN}', "\ufffd alone"),
    ],
)
def test_one_line(line, text):
    batch = batch_of_lines(line, ["text"])
    assert strings(batch.by_key[0]) == [text.encode()]
    assert batch.bad_lines == []


def test_ordinary_lines_never_reach_python(monkeypatch):
    monkeypatch.setattr(sources, "parse_line", lambda line, keys: pytest.fail(f"asked for {line!r}"))
    values = [*VALUES[:4], "日本語 and 😀", 'tab\t quote" and \u2028']
    lines = [
        json.dumps({"n": [n, -1.5e3, None, True], "meta": {"deep": [[{}]]}, "text": value}, ensure_ascii=n % 2 == 0)
        for n, value in enumerate(values * 2)
    ]
    batch = batch_of_lines("\n".join(lines).encode(), ["text"])
    assert strings(batch.by_key[0]) == [value.encode() for value in values * 2]


def documents(prefix: Path) -> list[bytes]:
    return [document.tobytes()[::2] for document in IndexedDataset(prefix)]


def test_plain_text_is_one_document_a_file(tmp_path, tokenizer, quiet):
    for name, data in (("b", b"two\nlines"), ("a", b"\xef\xbb\xbfone"), ("c", b"\xff")):
        (tmp_path / f"{name}.txt").write_bytes(data)
    summary = preprocess([tmp_path / "*.txt"], tokenizer, tmp_path / "o", on_error="skip", console=quiet)
    assert documents(tmp_path / "o_text_document") == [b"one", b"two\nlines"]
    assert [str(bad) for bad in summary.bad_lines] == [f"{tmp_path / 'c.txt'}:1: not UTF-8 at byte 0"]
    with pytest.raises(DataError, match="plain text is one string, and has no keys"):
        preprocess([tmp_path / "a.txt"], tokenizer, tmp_path / "p", json_keys=("a", "b"), console=quiet)


def write_parquet(path: Path, row_group_size: int, **columns: list) -> Path:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table(columns), path, row_group_size=row_group_size)
    return path


def test_parquet(tmp_path, tokenizer, quiet, small_parts):
    texts = [f"row {n} äöü " * (n % 50) for n in range(1000)]
    titles = [None if n == 7 else str(n) for n in range(1000)]
    file = write_parquet(tmp_path / "a.parquet", 100, text=texts, title=titles, n=list(range(1000)))
    for workers in (1, 2):
        prefix = tmp_path / f"w{workers}"
        summary = preprocess(
            [file], tokenizer, prefix, json_keys=("text", "title"), on_error="skip", workers=workers, console=quiet
        )
        filled = [text for n, text in enumerate(texts) if text and n != 7]
        assert documents(Path(f"{prefix}_text_document")) == [text.encode() for text in filled]
        assert documents(Path(f"{prefix}_title_document")) == [str(n).encode() for n in range(1000) if n != 7]
        assert [str(bad) for bad in summary.bad_lines] == [f'{file}:8: "title" is null']


def test_parquet_that_cannot_be_read(tmp_path, tokenizer, quiet, monkeypatch):
    file = write_parquet(tmp_path / "a.parquet", 10, text=["a" * 100, "b"], n=[1, 2])

    def refused(match, **options):
        with pytest.raises(DataError, match=match):
            preprocess([file], tokenizer, tmp_path / "o", console=quiet, **options)

    refused("column 'body' +is not in the file +it has text, n", json_keys=("body",))
    refused("column 'n' +holds int64 +name a column of strings", json_keys=("n",))
    refused("a value +is longer than 99 bytes", limits=Limits(max_document_bytes=99))
    file.write_bytes(file.read_bytes()[:-9])
    refused(r"a\.parquet +cannot be read: .*damaged or truncated")
    assert list(tmp_path.iterdir()) == [file]
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(MissingDependency, match=r"pip install 'megascratch\[parquet\]'"):
        preprocess([file], tokenizer, tmp_path / "o", console=quiet)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
@pytest.mark.parametrize("id_dtype", [np.uint16, np.uint32])
def test_pack(id_dtype, dtype):
    ids, ends, like = np.array([1, 2, 3], id_dtype), np.array([0, 2, 2, 3]), np.empty(0, dtype)
    tokens, lengths = pack(ids, ends, 9, like)
    assert (tokens.tolist(), lengths.tolist(), tokens.dtype) == ([1, 2, 9, 3, 9], [0, 3, 0, 2], dtype)
    tokens, lengths = pack(ids, ends, None, like)
    assert (tokens.tolist(), lengths.tolist(), tokens.dtype) == ([1, 2, 3], [0, 2, 0, 1], dtype)
    for wrong in ([0, 2], [2, 1, 3], [0, 4]):
        with pytest.raises(ValueError, match="ends must rise to the number of ids"):
            pack(ids, np.array(wrong), 9, like)


def test_pack_refuses_what_does_not_fit():
    for token, dtype in ((1 << 16, np.uint16), (1 << 31, np.int32)):
        with pytest.raises(IndexError, match="does not fit the dtype"):
            pack(np.array([token], np.uint32), np.array([1]), None, np.empty(0, dtype))
