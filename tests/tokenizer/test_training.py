"""Training: the merges of Hugging Face's trainer, from texts and from files; every mistake named before the work."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from megascratch.errors import TokenizerError
from megascratch.log import make_console
from megascratch.tokenizer import PATTERNS, Tokenizer, _bpe, train, train_from_texts
from megascratch.tokenizer.alphabet import BYTES_IN_ID_ORDER
from megascratch.tokenizer.corpus import plain_texts, sample_evenly
from megascratch.tokenizer.hugging_face import render

QUIET = make_console(rank=1)


def reference(texts: list[str], n_tokens: int, pattern: str) -> dict:
    """What `tokenizers` learns: the vocabulary and merges of its BpeTrainer."""
    oracle = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(tokenizers.Regex(PATTERNS[pattern]), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    oracle.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    oracle.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=n_tokens, initial_alphabet=alphabet, show_progress=False)
    )
    return json.loads(oracle.to_str())["model"]


def assert_learns_the_same(texts: list[str], n_tokens: int, pattern: str) -> None:
    expected = reference(texts, n_tokens, pattern)
    ours = render(train_from_texts(texts, n_tokens, pattern, (), console=QUIET).vocabulary)["model"]
    assert ours["merges"] == expected["merges"]
    assert ours["vocab"] == expected["vocab"]


@pytest.mark.parametrize("pattern", ["gpt2", "cl100k", "o200k"])
def test_merges_are_those_of_tokenizers(pattern: str, source_texts: list[str], mixed_text: str) -> None:
    assert_learns_the_same([*source_texts[:30], mixed_text[:400_000]], 4000, pattern)


@pytest.mark.parametrize("seed", range(12))
def test_ties_and_overlaps_are_broken_as_tokenizers_breaks_them(seed: int) -> None:
    rng = random.Random(seed)
    letters = ["a", "ab", "abc", "=-"][seed % 4]
    texts = [" ".join("".join(rng.choices(letters, k=rng.randint(1, 40))) for _ in range(60)) for _ in range(5)]
    assert_learns_the_same(texts, 256 + 25, "gpt2")


def test_ids_are_bytes_then_merges_then_special_tokens() -> None:
    tokenizer = train_from_texts(["low low lower"], 256 + 2 + 2, "gpt2", ("<|endoftext|>", "<|pad|>"), console=QUIET)
    assert tokenizer.vocab_size == 260
    assert tokenizer.token_bytes(0) == b"!"
    assert [tokenizer.token_bytes(id) for id in (256, 257)] == [b"lo", b"low"]
    assert tokenizer.special_tokens == {"<|endoftext|>": 258, "<|pad|>": 259}
    assert tokenizer.eod_id == 258


def test_a_special_token_of_an_unusual_name_ends_documents() -> None:
    assert train_from_texts(["abc abc"], 259, special_tokens=("<eod>", "<pad>"), console=QUIET).eod_id == 257


def test_special_tokens_in_the_text_teach_nothing() -> None:
    tokenizer = train_from_texts(["<|endoftext|>ab<|endoftext|>" * 100], 256 + 1 + 1, console=QUIET)
    assert tokenizer.token_bytes(256) == b"ab"


def test_files_teach_what_their_texts_do(tmp_path: Path, source_texts: list[str]) -> None:
    plain, jsonl = tmp_path / "plain.txt", tmp_path / "texts.jsonl"
    plain.write_text(source_texts[0], "utf-8", newline="")
    jsonl.write_text("\n\n".join(json.dumps({"id": n, "body": text}) for n, text in enumerate(source_texts[1:5])))
    from_files = train([plain, jsonl], 1000, json_key="body", console=QUIET)
    from_texts = train_from_texts(source_texts[:5], 1000, console=QUIET)
    assert from_files.vocabulary.tokens == from_texts.vocabulary.tokens


@pytest.mark.parametrize("pattern", PATTERNS)
def test_cutting_a_large_file_changes_no_piece(pattern: str, tmp_path: Path, tokenizers_by_pattern: dict) -> None:
    tokenizer: Tokenizer = tokenizers_by_pattern[pattern]
    text = "x = 'it''s';\n\n\n  def f(a):\n\n\treturn 12345\r\n\n # naïve\n日本\n\nend\n" * 50
    path = tmp_path / "text"
    path.write_text(text, "utf-8", newline="")
    chunks = [chunk for chunk, _ in plain_texts(path, 200)]
    assert len(chunks) > 10
    assert b"".join(chunks) == text.encode()
    assert [id for chunk in chunks for id in tokenizer.encode_bytes(chunk)] == tokenizer.encode(text)


def test_plain_files_need_not_be_utf8(tmp_path: Path) -> None:
    path = tmp_path / "latin1.txt"
    path.write_bytes(b"\xe9\xe8a\xe9\xe8a")
    assert train([path], 256 + 1 + 1, console=QUIET).token_bytes(256) == b"\xe9\xe8"


def test_a_limit_takes_texts_evenly(tmp_path: Path) -> None:
    texts = [b"%04d" % n * (1 + n % 7) for n in range(7000)]
    total = sum(map(len, texts))
    taken = list(sample_evenly(texts, 0.1))
    assert total * 0.095 < sum(map(len, taken)) <= total * 0.1
    for part in range(7):  # as much from each part as from any other
        assert sum(map(len, set(taken) & set(texts[part * 1000 : (part + 1) * 1000]))) == pytest.approx(
            total * 0.1 / 7, rel=0.05
        )
    assert list(sample_evenly(texts, 1.0)) == texts
    path = tmp_path / "halves.txt"
    path.write_bytes(b"abab cdcd\n" * 20_000 + b"xyxy zwzw\n" * 20_000)
    few, all_of_it = (train([path], 267, limit_bytes=limit, console=QUIET) for limit in (100_000, None))
    assert {*few.vocabulary.tokens} == {*all_of_it.vocabulary.tokens}  # the second half is in the sample too


def test_every_mistake_is_named_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError) as caught:
        train([tmp_path / "missing.txt", tmp_path], 100, "clk100", ("<a>", "<a>", "b", "Ġthe", "\udcff\udcff"))
    message = str(caught.value)
    assert "8 problems in tokenizer training" in message
    for part in (
        "missing.txt",
        "cannot be read: No such file or directory",
        "is a directory",
        "vocab_size = 100",
        "use at least 261",
        "did you mean cl100k?",
        "special token '<a>'",
        "is given twice",
        "special token 'b'",
        "longer than one byte",
        "special token 'Ġthe'",
        "reads as plain bytes",
    ):
        assert part in message


def test_no_files() -> None:
    with pytest.raises(TokenizerError, match="name at least one file"):
        train([], 300)
    with pytest.raises(TokenizerError, match=r"limit_bytes = 0\s+must be at least 1"):
        train([], 300, limit_bytes=0)


def test_too_little_text_says_what_is_in_reach() -> None:
    with pytest.raises(TokenizerError, match=r"the text yields only 2 merges\s+use vocab_size ≤ 259"):
        train_from_texts(["abc"], 300, console=QUIET)
    assert train_from_texts(["abc"], 259, console=QUIET).vocab_size == 259


def test_an_empty_corpus(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    with pytest.raises(TokenizerError, match="holds no text"):
        train([tmp_path / "empty.txt"], 300, console=QUIET)


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ("{oops", "is not JSON"),
        ('{"body": "x"}', "must be an object with the key 'text'"),
        ("[1]", "must be an object with the key 'text'"),
        ('{"text": 5}', "must hold a string under 'text'"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_bad_lines_are_named_by_file_and_number(tmp_path: Path, line: str, rule: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(TokenizerError, match=rf"bad\.jsonl, line 2\s+{rule}"):
        train([path], 300, console=QUIET)


def test_interrupting_the_merges_stops_them(source_texts: list[str]) -> None:
    counter = _bpe.PieceCounter()
    text = source_texts[0].encode()
    counter.add("gpt2", text, np.array([len(text)]), 1)

    def interrupt(n_tokens: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        counter.train(BYTES_IN_ID_ORDER, 1000, interrupt)
