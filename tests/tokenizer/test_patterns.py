"""Pre-tokenisation: worked examples, bytes that are not text, patterns of others."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megascratch.errors import TokenizerError
from megascratch.tokenizer.patterns import PATTERNS, Splitter, finder, pattern_named


def pieces(pattern: str, text: str) -> list[str]:
    split = Splitter(pattern).split(text)
    starts = [0, *split.ends.tolist()]
    return [split.utf8[a:b].decode("utf-8", "surrogateescape") for a, b in pairwise(starts)]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("gpt2", "don't pay 12345  now", ["don", "'t", " pay", " 12345", " ", " now"]),
        ("cl100k", "don't pay 12345  now", ["don", "'t", " pay", " ", "123", "45", " ", " now"]),
        ("o200k", "don't pay 12345  now", ["don't", " pay", " ", "123", "45", " ", " now"]),
        ("gpt2", "DON'T", ["DON", "'", "T"]),
        ("cl100k", "DON'T", ["DON", "'T"]),
        ("cl100k", "a;\n\n b", ["a", ";\n\n", " b"]),
        ("gpt2", "a;\n\n b", ["a", ";", "\n\n", " b"]),
        ("o200k", "camelCase", ["camel", "Case"]),
        ("llama3", "camelCase", ["camelCase"]),
        ("cl100k", "naïve 日本語 🙂", ["naïve", " 日本語", " 🙂"]),
    ],
)
def test_examples(name: str, text: str, expected: list[str]) -> None:
    assert pieces(PATTERNS[name], text) == expected


@pytest.mark.parametrize("name", PATTERNS)
@settings(max_examples=100, deadline=None)
@given(text=st.text())
def test_pieces_cover_any_text(name: str, text: str) -> None:
    text = text.encode("utf-8", "ignore").decode()
    assert "".join(pieces(PATTERNS[name], text)) == text


def test_offsets_are_of_bytes_even_where_they_are_not_utf8() -> None:
    data = b"abc \xff\xfe\xe4\xbd d\xc3\xa9f"
    split = Splitter(PATTERNS["cl100k"]).split(data.decode("utf-8", "surrogateescape"))
    assert split.utf8 == data
    assert split.ends.tolist() == [3, 8, 13]


def test_what_a_foreign_pattern_skips_is_a_piece_too() -> None:
    assert pieces(r"\d+", "ab12cd345") == ["ab", "12", "cd", "345"]
    assert pieces(r"\d+", "abc") == ["abc"]
    assert pieces(r"\d*", "a1é22") == ["a", "1", "é", "22"]  # empty matches cut, and yield nothing
    assert pieces(r"\d+", "") == []


def test_finder_takes_the_longest_of_those_that_start_first() -> None:
    found = finder(["<|a", "<|a|>", "b"])
    assert found is not None
    assert found.split("x<|a|>b<|ay") == ["x", "<|a|>", "", "b", "", "<|a", "y"]


def test_unknown_pattern_suggests_the_nearest() -> None:
    with pytest.raises(TokenizerError, match=r"one of gpt2, cl100k, o200k, llama3, qwen2\s+did you mean cl100k\?"):
        pattern_named("cl100")


def test_a_pattern_that_does_not_compile() -> None:
    with pytest.raises(TokenizerError, match="not a regular expression"):
        Splitter(r"[unclosed")
