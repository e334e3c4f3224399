"""Encoding and decoding: the ids of `tokenizers` and `tiktoken`, exact round trips, special tokens, long runs."""

import itertools
import json
import pickle
import random
import struct
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken_ext import openai_public

from megascratch.errors import TokenizerError
from megascratch.log import make_console
from megascratch.tokenizer import PATTERNS, AddedToken, StreamDecoder, Tokenizer, _bpe, train_from_texts
from megascratch.tokenizer.hugging_face import render

SHARED_TEXTS = sorted(Path("../shared/data").glob("*.txt"))
LLAMA3 = (  # as Llama 3's own code gives it to tiktoken
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TIKTOKEN_CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
TIKTOKEN_O200K = "|".join(
    [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
# tiktoken's own spelling of each pattern, so that ours is compared with it and not with itself.
TIKTOKEN_PATTERNS = {
    "gpt2": openai_public.r50k_pat_str,
    "cl100k": TIKTOKEN_CL100K,
    "o200k": TIKTOKEN_O200K,
    "llama3": LLAMA3,
    "qwen2": LLAMA3.replace("{1,3}", ""),
}


def assert_same_ids(ours: list[int], theirs: list[int], tokenizer: Tokenizer) -> None:
    if ours != theirs:
        first = next((n for n, (a, b) in enumerate(zip(ours, theirs)) if a != b), min(len(ours), len(theirs)))
        around = slice(max(0, first - 3), first + 5)
        pytest.fail(
            f"ids differ from {first}: {[tokenizer.token_bytes(id) for id in ours[around]]}"
            f" against {[tokenizer.token_bytes(id) for id in theirs[around]]}"
        )


@pytest.mark.parametrize("pattern", PATTERNS)
def test_ids_are_those_of_tokenizers(
    pattern: str, tokenizers_by_pattern: dict[str, Tokenizer], mixed_text: str, tmp_path: Path
) -> None:
    tokenizer = tokenizers_by_pattern[pattern]
    oracle = tokenizers.Tokenizer.from_file(str(tokenizer.save(tmp_path / "tokenizer.json")))
    theirs = oracle.encode(mixed_text, add_special_tokens=False).ids
    assert_same_ids(tokenizer.encode(mixed_text, allowed_special="all"), theirs, tokenizer)
    assert oracle.decode(theirs, skip_special_tokens=False) == mixed_text


def tiktoken_of(tokenizer: Tokenizer, pattern: str, folder: Path) -> tiktoken.Encoding:
    """Return tiktoken's encoding with our ranks and its own pattern."""
    tokenizer.save_tiktoken(folder / "ranks.tiktoken")
    return tiktoken.Encoding(
        "ours",
        pat_str=TIKTOKEN_PATTERNS[pattern],
        mergeable_ranks=tiktoken.load.load_tiktoken_bpe(str(folder / "ranks.tiktoken")),
        special_tokens=tokenizer.special_tokens,
    )


@pytest.mark.parametrize("pattern", PATTERNS)
def test_ids_are_those_of_tiktoken(
    pattern: str, tokenizers_by_pattern: dict[str, Tokenizer], mixed_text: str, tmp_path: Path
) -> None:
    tokenizer = tokenizers_by_pattern[pattern]
    oracle = tiktoken_of(tokenizer, pattern, tmp_path)
    assert_same_ids(tokenizer.encode(mixed_text), oracle.encode_ordinary(mixed_text), tokenizer)
    assert_same_ids(
        tokenizer.encode(mixed_text, allowed_special="all"), oracle.encode(mixed_text, allowed_special="all"), tokenizer
    )


@pytest.mark.parametrize("pattern", PATTERNS)
def test_spaces_at_the_end_are_cut_as_tiktoken_cuts_them(
    pattern: str, tokenizers_by_pattern: dict[str, Tokenizer], tmp_path: Path
) -> None:
    tokenizer = tokenizers_by_pattern[pattern]
    oracle = tiktoken_of(tokenizer, pattern, tmp_path)
    for spaces in itertools.product(" \n\t\r\u3000", repeat=4):
        for text in ("a" + "".join(spaces), "".join(spaces) + "<|endoftext|>" + "".join(spaces)):
            expected = oracle.encode(text, allowed_special="all")
            assert_same_ids(tokenizer.encode(text, allowed_special="all"), expected, tokenizer)


@pytest.mark.skipif(not SHARED_TEXTS, reason="no ../shared/data")
@pytest.mark.parametrize("path", SHARED_TEXTS, ids=lambda path: path.name)
def test_ids_of_prose_are_those_of_tokenizers(path: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    text = path.read_text("utf-8")
    oracle = tokenizers.Tokenizer.from_file(str(tokenizer.save(tmp_path / "tokenizer.json")))
    assert_same_ids(tokenizer.encode(text), oracle.encode(text).ids, tokenizer)


@settings(max_examples=300, deadline=None)
@given(data=st.binary() | st.text(alphabet="a'sT 1\n\r\u00e9\u4e00\U0001f642").map(str.encode))
def test_any_bytes_come_back(tokenizer: Tokenizer, data: bytes) -> None:
    assert tokenizer.decode_bytes(tokenizer.encode_bytes(data)) == data


@settings(max_examples=300, deadline=None)
@given(text=st.text())
def test_any_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode_bytes(text.encode()) == tokenizer.encode(text)


def test_lone_surrogates_become_replacement_characters(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("a\ud800b\udcffc")) == "a\ufffdb\ufffdc"
    assert tokenizer.decode(tokenizer.encode("\ud83d\ude42")) == "🙂"


def test_a_batch_is_its_texts_one_by_one(tokenizer: Tokenizer, source_texts: list[str], mixed_text: str) -> None:
    texts = ["", *source_texts, "", "é", "<|endoftext|>", mixed_text * 5, ""]  # more than one inner batch
    expected = [tokenizer.encode(text) for text in texts]
    for threads in (1, 3):
        batch = tokenizer.encode_batch(texts, threads=threads)
        assert all(ids.dtype == np.int32 for ids in batch)
        assert [ids.tolist() for ids in batch] == expected
    assert tokenizer.encode_batch([]) == []
    assert tokenizer.encode_batch(["", ""])[1].tolist() == []


def test_documents_in_one_buffer(tokenizer: Tokenizer, source_texts: list[str], mixed_text: str) -> None:
    texts = ["", *source_texts, "", "é", "<|endoftext|>", mixed_text * 2, "  \n ", ""]
    utf8 = [text.encode() for text in texts]
    ends = np.cumsum([len(data) for data in utf8])
    expected = [tokenizer.encode(text) for text in texts]
    wide = Tokenizer(replace(tokenizer.vocabulary, tokens=[*tokenizer.vocabulary.tokens, *[b""] * (1 << 16)]))
    for made, dtype in ((tokenizer, np.uint16), (wide, np.uint32)):
        for threads in (1, 3):  # three share out the long text too
            ids, id_ends = made.encode_documents(memoryview(b"".join(utf8)), ends, threads)
            assert ids.dtype == dtype
            assert [part.tolist() for part in np.split(ids, id_ends[:-1])] == expected
    assert [array.tolist() for array in tokenizer.encode_documents(b"", np.array([], np.int64))] == [[], []]
    for wrong in ([2, 1, 3], [1, 2], [4]):
        with pytest.raises(ValueError, match="ends must"):
            tokenizer.encode_documents(b"abc", np.array(wrong))


def test_threads_that_hear_what_others_have_made(tokenizer: Tokenizer) -> None:
    """Made-up words all over the text, in a new tokenizer: a thread finds most of them among what another has told."""
    rng = random.Random(0)
    words = ["".join(rng.choices("aeioubdkmnrst", k=rng.randint(4, 12))) for _ in range(20_000)]
    texts = [" ".join(rng.choices(words, k=1000)).encode() for _ in range(300)]
    ends = np.cumsum([len(text) for text in texts])
    one_ids, one_ends = tokenizer.encode_documents(b"".join(texts), ends)
    for threads in (2, 5):
        ids, id_ends = Tokenizer(tokenizer.vocabulary).encode_documents(b"".join(texts), ends, threads)
        assert np.array_equal(ids, one_ids)
        assert np.array_equal(id_ends, one_ends)


def test_documents_that_python_has_to_cut(tokenizer: Tokenizer) -> None:
    """A normaliser, a token that is always found, a pattern without a scanner: the ids are those of `encode`."""
    texts = ["e\u0301cole self.assertEqual", "", "a1 22 self.assertTrue"]
    utf8 = [text.encode() for text in texts]
    plain = tokenizer.vocabulary
    found = AddedToken(tokenizer.vocab_size, "self.assert", special=False)
    for vocabulary in (
        replace(plain, normalizer=("NFC",)),
        replace(plain, tokens=[*plain.tokens, b""], added=(*plain.added, found)),
        replace(plain, pattern=r"\w+|\W+"),
    ):
        other = Tokenizer(vocabulary)
        ids, id_ends = other.encode_documents(b"".join(utf8), np.cumsum([len(data) for data in utf8]), threads=2)
        expected = [other.encode(text) for text in texts]
        assert [part.tolist() for part in np.split(ids, id_ends[:-1])] == expected
        assert expected != [tokenizer.encode(text) for text in texts]


@pytest.mark.parametrize("seed", range(8))
def test_longest_matches_taken_back_are_what_merging_yields(seed: int) -> None:
    """Few letters make vocabularies in which the longest match is often wrong."""
    rng = random.Random(seed)
    letters = ["a", "ab", "aab", "abc"][seed % 4]
    draw = [" ".join("".join(rng.choices(letters, k=rng.randint(1, 30))) for _ in range(80)) for _ in range(6)]
    trained = train_from_texts(draw[:5], 256 + 20 + seed, "gpt2", (), console=make_console(rank=1))
    encoder = _bpe.Encoder(trained.vocabulary.tokens, trained.vocabulary.merges, whole_first=False)
    assert encoder.linear
    oracle = tokenizers.Tokenizer.from_str(json.dumps(render(trained.vocabulary)))
    lengths = [*range(1, 120), 255, 256, 257, 700]  # short ones are encoded together, those over 256 bytes alone
    words = ["".join(rng.choices(letters, k=length)) for length in lengths]
    for text in (*words, draw[5]):
        assert_same_ids(trained.encode(text), oracle.encode(text).ids, trained)


def test_rules_that_no_training_yields_are_merged_by_the_book(tokenizer: Tokenizer, mixed_text: str) -> None:
    merges = tokenizer.vocabulary.merges.copy()
    merges[:, 3] = merges[::-1, 3]  # the last merge goes first
    backwards = replace(tokenizer.vocabulary, merges=merges[::-1])
    assert not _bpe.Encoder(backwards.tokens, backwards.merges, whole_first=False).linear
    oracle = tokenizers.Tokenizer.from_str(json.dumps(render(backwards)))
    text = mixed_text[:100_000]
    ids = Tokenizer(backwards).encode(text, allowed_special="all")
    assert_same_ids(ids, oracle.encode(text).ids, tokenizer)


def test_at_least_one_thread(tokenizer: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match=r"threads = 0\s+must be at least 1"):
        tokenizer.encode_batch(["a"], threads=0)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("letters", ["a", "ab", "=", "é", " ", "漢字", "\n"])
@pytest.mark.parametrize("pattern", ["gpt2", "o200k"])
def test_a_megabyte_without_a_break_takes_bounded_work(
    pattern: str, letters: str, tokenizers_by_pattern: dict[str, Tokenizer]
) -> None:
    text = letters * (1_000_000 // len(letters))
    start = time.process_time()
    ids = tokenizers_by_pattern[pattern].encode(text)
    assert time.process_time() - start < 5  # takes about 0.02 s; 10^12 steps would take minutes
    assert tokenizers_by_pattern[pattern].decode(ids) == text


def test_long_and_short_pieces_merge_alike(tokenizer: Tokenizer, source_texts: list[str]) -> None:
    letters = "".join(filter(str.isalpha, source_texts[0]))[:400]
    oracle = tokenizers.Tokenizer.from_str(json.dumps(render(tokenizer.vocabulary)))
    for length in range(1, len(letters), 3):  # across the border between scan and heap
        assert tokenizer.encode(letters[:length]) == oracle.encode(letters[:length]).ids


def test_the_cache_never_answers_for_another_piece(tokenizer: Tokenizer) -> None:
    """Words enough to fill every slot several times over, many of them the beginning of another."""
    rng = random.Random(0)
    text = " ".join("".join(rng.choices("abcdefgh", k=rng.randint(1, 9))) for _ in range(200_000))
    oracle = tokenizers.Tokenizer.from_str(json.dumps(render(tokenizer.vocabulary)))
    assert_same_ids(tokenizer.encode(text), oracle.encode(text).ids, tokenizer)


def test_the_cache_is_right_after_its_memory_has_been_used_again(tokenizer: Tokenizer) -> None:
    """Long words whose ids and bytes take 2.5 times its 32 MiB; some come back soon, some when they are gone."""
    letters = "".join(random.Random(1).choices("etaoinshrdlu", k=200_000))
    words = [f" {letters[i : i + 200]}" for i in range(150_000)]
    words = [word for i in range(0, len(words), 1000) for word in (*words[i : i + 1000], *words[:100], *words[-100:])]
    ends = np.cumsum([len(word) for word in words])
    text = "".join(words).encode()
    ids, id_ends = tokenizer.encode_documents(text, ends)
    for first in range(0, len(words), 12_000):  # by tokenizers that never come so far
        last = min(first + 12_000, len(words))
        begin, id_begin = (int(ends[first - 1]), int(id_ends[first - 1])) if first else (0, 0)
        fresh = Tokenizer(tokenizer.vocabulary)
        expected, expected_ends = fresh.encode_documents(text[begin : int(ends[last - 1])], ends[first:last] - begin)
        assert np.array_equal(ids[id_begin : id_ends[last - 1]], expected)
        assert np.array_equal(id_ends[first:last] - id_begin, expected_ends)


@pytest.mark.parametrize("filler", [228, 232, 236, 240])
def test_text_cannot_pose_as_a_record_of_the_cache(filler: int) -> None:
    """Where a record was, there is the text of another once its memory has been used again, and looks like it."""
    encoder = _bpe.Encoder([bytes([byte]) for byte in range(256)], np.zeros((0, 4), np.int32), whole_first=True)

    def encode(*pieces: bytes) -> list[int]:
        ends = np.cumsum([len(piece) for piece in pieces])
        return encoder.encode(b"".join(pieces), ends, np.array([len(pieces)]), 1)[0].tolist()

    forged = struct.pack("<HHI", 6, 1, 7) + b"zqxjkv\0\0"  # a length, a number of ids, the id, and the bytes
    assert encode(b"q" * filler, b"zqxjkv") == list(b"q" * filler + b"zqxjkv")
    encode(*(forged * 15 + b"%016d" % i for i in range(26_500)))  # 34 MB of records
    assert encode(b"zqxjkv") == list(b"zqxjkv")


def test_special_tokens_in_text_are_text_unless_allowed(tokenizer: Tokenizer) -> None:
    text = "a<|endoftext|>b"
    assert tokenizer.eod_id == tokenizer.vocab_size - 1
    assert tokenizer.eod_id not in tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    for allowed in ("all", ["<|endoftext|>"]):
        ids = tokenizer.encode(text, allowed_special=allowed)
        assert ids == [*tokenizer.encode("a"), tokenizer.eod_id, *tokenizer.encode("b")]
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode(ids, skip_special=True) == "ab"
    assert tokenizer.encode("<|endoftext|>" * 2, allowed_special="all") == [tokenizer.eod_id] * 2


def test_disallowed_special_tokens_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match=r"'<\|endoftext\|>' in the text\s+is a special token\s+allow it"):
        tokenizer.encode("a<|endoftext|>", disallowed_special="all")
    assert tokenizer.encode("<|endoftext|>", allowed_special="all", disallowed_special="all") == [tokenizer.eod_id]
    with pytest.raises(TokenizerError, match=r"special token '<x>'\s+is not in the vocabulary"):
        tokenizer.encode("a", allowed_special=["<x>"])


def test_ids_outside_the_vocabulary(tokenizer: Tokenizer) -> None:
    for id in (-1, tokenizer.vocab_size):
        with pytest.raises(TokenizerError, match=rf"token id {id}\s+must be from 0 to {tokenizer.vocab_size - 1}"):
            tokenizer.decode([0, id])


def test_byte_lengths_add_up_to_the_text(tokenizer: Tokenizer, mixed_text: str) -> None:
    ids = tokenizer.encode(mixed_text)
    assert tokenizer.byte_lengths()[ids].sum() == len(mixed_text.encode())
    assert sum(len(tokenizer.token_bytes(id)) for id in ids) == len(mixed_text.encode())
    assert tokenizer.byte_lengths()[tokenizer.eod_id] == 0


def test_a_stream_never_splits_a_character(tokenizer: Tokenizer, mixed_text: str) -> None:
    ids = tokenizer.encode(mixed_text[:50_000])
    stream = StreamDecoder(tokenizer)
    parts = [stream.feed(id) for id in ids]
    assert not any("\ufffd" in part for part in parts)
    assert "".join(parts) + stream.finish() == mixed_text[:50_000]


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=40))
def test_a_stream_gives_what_decoding_at_once_gives(tokenizer: Tokenizer, data: bytes) -> None:
    ids = tokenizer.encode_bytes(data)
    stream = StreamDecoder(tokenizer)
    assert "".join(map(stream.feed, ids)) + stream.finish() == tokenizer.decode(ids)


def test_a_tokenizer_travels_to_worker_processes(tokenizer: Tokenizer) -> None:
    assert pickle.loads(pickle.dumps(tokenizer)).encode("def f(x):") == tokenizer.encode("def f(x):")
