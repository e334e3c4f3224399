"""The C++ scanners against the `regex` package, and their Unicode table against Python's."""

import importlib.util
import unicodedata
from pathlib import Path
from random import Random
from types import ModuleType

import numpy as np
import pytest
import regex

from megascratch.tokenizer import PATTERNS, _bpe

CHANGED_IN_UNICODE_17 = {0x295}  # from Ll to Lo


def tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[2] / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def fuzzer() -> ModuleType:
    return tool("fuzz_scanner")


def test_random_strings_are_cut_as_regex_cuts_them(fuzzer: ModuleType) -> None:
    assert fuzzer.first_difference(60_000, seed=7) is None


def test_the_fuzzer_sees_a_wrong_pattern(fuzzer: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, other in (("cl100k", "llama3"), ("llama3", "qwen2"), ("o200k", "cl100k"), ("gpt2", "cl100k")):
        monkeypatch.setattr(fuzzer, "PATTERNS", {name: PATTERNS[other]})
        assert fuzzer.first_difference(20_000, seed=7) is not None


def test_the_table_differs_from_regex_only_in_what_is_newer_there(fuzzer: ModuleType) -> None:
    ours = np.frombuffer(_bpe.character_classes(), np.uint8)
    assert {c for c in fuzzer.disputed().tolist() if ours[c] != 0} <= CHANGED_IN_UNICODE_17


def test_the_table_is_that_of_unicodedata() -> None:
    table = tool("unicode_table")
    table.unicodedata = unicodedata  # this Python's own, older or newer than the table
    ours = _bpe.character_classes()
    for code_point in range(0x110000):
        if ours[code_point] != 0 and unicodedata.category(chr(code_point)) != "Cn":
            assert table.class_of(code_point) == ours[code_point] or code_point in CHANGED_IN_UNICODE_17


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("length", [1, 15, 16, 17, 31, 32, 33, 64])
def test_runs_end_where_they_end(name: str, length: int) -> None:
    """Letters are taken sixteen at a time: the ends of runs, and of the text, at and around that."""
    for last in ("", " ", "B", "é", "漢", "1", "'s", "\n"):
        for first in ("", " ", "B", "é"):
            text = first + "a" * length + last
            expected = [piece.encode() for piece in regex.findall(PATTERNS[name], text)]
            ends = _bpe.scan(name, text.encode()).tolist()
            assert [text.encode()[a:b] for a, b in zip([0, *ends], ends)] == expected


@pytest.mark.parametrize("name", PATTERNS)
def test_windows_of_characters_meet_where_pieces_meet(fuzzer: ModuleType, name: str) -> None:
    """64 characters are cut at a time: long texts of what patterns tell apart, against `regex` and the lowest level."""
    random = Random(3)
    lowest = pytest.importorskip("megascratch.tokenizer._bpe_v2")
    pattern = regex.compile(PATTERNS[name])
    for _ in range(1500):
        text = "".join(random.choices(fuzzer.BITS, k=random.randint(10, 120)))
        utf8 = text.encode()
        ends = _bpe.scan(name, utf8).tolist()
        assert ends == lowest.scan(name, utf8).tolist()
        assert [utf8[a:b] for a, b in zip([0, *ends], ends)] == [piece.encode() for piece in pattern.findall(text)]


@pytest.mark.parametrize("name", PATTERNS)
def test_characters_beyond_ascii_are_read_alike_one_by_one_and_by_windows(fuzzer: ModuleType, name: str) -> None:
    """Letters with and without case, marks, symbols, broken bytes: a few kinds at a time, so that runs are long."""
    random = Random(4)
    lowest = pytest.importorskip("megascratch.tokenizer._bpe_v2")
    kinds = [c.encode() for c in "aZéÉ漢あกשعა้́ि١—😀𝒜\u3000 !\n"] + [b"'s", *fuzzer.BAD_BYTES]
    for _ in range(4000):
        few = random.sample(kinds, k=random.choice([2, 4, 8]))
        text = b"".join(random.choices(few, weights=[random.choice([1, 5, 20]) for _ in few], k=random.randint(5, 150)))
        assert _bpe.scan(name, text).tolist() == lowest.scan(name, text).tolist()


def test_an_unknown_scanner() -> None:
    with pytest.raises(ValueError, match="no scanner for gpt5"):
        _bpe.scan("gpt5", b"a")
