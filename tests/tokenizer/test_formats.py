"""One door for every format; the pattern of rank files; Megatron's pair of files."""

import base64
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import tiktoken
import transformers

from megascratch.errors import TokenizerError
from megascratch.tokenizer import PATTERNS, AddedToken, Tokenizer
from megascratch.tokenizer.formats import files_of, guess_pattern, open_tokenizer, write
from megascratch.tokenizer.tiktoken_ranks import read_ranks


@pytest.mark.parametrize("pattern", ["gpt2", "o200k", "llama3"])
def test_rank_files_tell_their_pattern(
    pattern: str, tokenizers_by_pattern: dict[str, Tokenizer], mixed_text: str, tmp_path: Path
) -> None:
    tokenizer = tokenizers_by_pattern[pattern]
    file = tmp_path / "tokenizer.model"  # as Llama 3's is named
    tokenizer.save_tiktoken(file)
    assert PATTERNS[guess_pattern(list(read_ranks(file)), file)] == PATTERNS[pattern]
    again = open_tokenizer(tmp_path, special_tokens=tokenizer.special_tokens)
    assert again.encode(mixed_text[:50_000]) == tokenizer.encode(mixed_text[:50_000])
    assert again.eod_id == tokenizer.eod_id


def test_ranks_of_two_patterns(tokenizers_by_pattern: dict[str, Tokenizer], tmp_path: Path) -> None:
    write(tokenizers_by_pattern["cl100k"], "tiktoken", tmp_path / "a.tiktoken")
    with pytest.raises(TokenizerError, match=r"and several fit\s+name cl100k or llama3"):
        open_tokenizer(tmp_path / "a.tiktoken")


def test_ranks_like_gpt_4o_s(tokenizers_by_pattern: dict[str, Tokenizer], mixed_text: str, tmp_path: Path) -> None:
    """Special tokens beyond the ranks with a gap between them, found only on request, as tiktoken has it."""
    write(tokenizers_by_pattern["o200k"], "tiktoken", tmp_path / "o200k.tiktoken")
    special = {"<|endoftext|>": 3100, "<|endofprompt|>": 3118}
    ours = open_tokenizer(tmp_path / "o200k.tiktoken", special_tokens=special)
    lines = (tmp_path / "o200k.tiktoken").read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}
    oracle = tiktoken.Encoding("o200k-like", pat_str=PATTERNS["o200k"], mergeable_ranks=ranks, special_tokens=special)
    assert ours.vocab_size == oracle.n_vocab == 3119
    text = mixed_text[:200_000] + "a<|endofprompt|><|endoftext|>b"
    assert ours.encode(text) == oracle.encode(text, disallowed_special=())
    assert ours.encode(text, allowed_special="all") == oracle.encode(text, allowed_special="all")
    some = {"<|endofprompt|>"}
    assert ours.encode(text, allowed_special=some) == oracle.encode(text, allowed_special=some, disallowed_special=())
    write(ours, "tiktoken", tmp_path / "again.tiktoken")
    assert (tmp_path / "again.tiktoken").read_bytes() == (tmp_path / "o200k.tiktoken").read_bytes()


def test_ranks_of_no_known_pattern(tmp_path: Path) -> None:
    rng = random.Random(0)
    words = {f"{rng.choice('abc')} {n} x".encode() for n in range(500)}
    tokens = [*(bytes([byte]) for byte in range(256)), *words]
    lines = [b"%s %d" % (base64.b64encode(token), id) for id, token in enumerate(tokens)]
    (tmp_path / "a.tiktoken").write_bytes(b"\n".join(lines))
    with pytest.raises(
        TokenizerError, match=r"does not say its pattern, and none that we know fits\s+name one of gpt2,"
    ):
        open_tokenizer(tmp_path / "a.tiktoken")
    assert open_tokenizer(tmp_path / "a.tiktoken", "gpt2").vocab_size == 756


def test_megatron_files(tokenizers_by_pattern: dict[str, Tokenizer], mixed_text: str, tmp_path: Path) -> None:
    """GPT-2's own two files, which `transformers` reads too."""
    tokenizer = tokenizers_by_pattern["gpt2"]
    assert write(tokenizer, "megatron", tmp_path / "made") == [
        tmp_path / "made" / n for n in ("vocab.json", "merges.txt")
    ]
    text = mixed_text[:200_000]
    for source in ("made", "made/vocab.json"):
        again = open_tokenizer(tmp_path / source)
        assert again.encode(text) == tokenizer.encode(text)
        assert (again.vocab_size, again.eod_id) == (tokenizer.vocab_size, tokenizer.eod_id)
    oracle = transformers.GPT2Tokenizer.from_pretrained(str(tmp_path / "made"))
    assert oracle(text)["input_ids"] == tokenizer.encode(text, allowed_special="all")


def test_what_megatron_files_cannot_say(tokenizers_by_pattern: dict[str, Tokenizer], tmp_path: Path) -> None:
    gpt2 = tokenizers_by_pattern["gpt2"].vocabulary
    more = replace(gpt2, tokens=[*gpt2.tokens, b""], added=(*gpt2.added, AddedToken(len(gpt2.tokens), "<x>")))
    refused = {
        "it is not cut by GPT-2's pattern alone": tokenizers_by_pattern["cl100k"].vocabulary,
        "its one added token must be": more,
        "it takes whole pieces before merging": replace(gpt2, whole_first=True),
    }
    for reason, vocabulary in refused.items():
        with pytest.raises(TokenizerError, match=rf"cannot be written as vocab\.json and merges\.txt: {reason}"):
            write(Tokenizer(vocabulary), "megatron", tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("vocab", "merges", "message"),
    [
        (None, b"", r"vocab\.json\s+cannot be read: No such file"),
        (b"{}", None, r"merges\.txt\s+cannot be read: No such file"),
        (b"{", b"", r"is not GPT-2's vocab\.json: JSONDecodeError"),
        (b"{}", b"", r"is not GPT-2's vocab\.json: KeyError: '<\|endoftext\|>'"),
        (b"[]", b"", r"is not GPT-2's vocab\.json: TypeError"),
        (b"\xff", b"", r"vocab\.json\s+is not UTF-8"),
        (b'{"<|endoftext|>": 0}', b"#version: 0.2\na b c\n", r"is not GPT-2's vocab\.json: ValueError"),
        (b'{"<|endoftext|>": 0}', b"a b\n", r"needs 'a', which is not in the vocabulary"),
        (b'{"<|endoftext|>": 0}', b"", r"256 of the 256 single bytes"),
    ],
)
def test_damaged_megatron_files(tmp_path: Path, vocab: bytes | None, merges: bytes | None, message: str) -> None:
    for name, content in (("vocab.json", vocab), ("merges.txt", merges)):
        if content is not None:
            (tmp_path / name).write_bytes(content)
    with pytest.raises(TokenizerError, match=message):
        open_tokenizer(tmp_path / "vocab.json")


def test_a_merge_of_number_signs(tokenizers_by_pattern: dict[str, Tokenizer], tmp_path: Path) -> None:
    """Only the first line of merges.txt is a comment: "# #" is a merge, and so is "#version: x" anywhere else."""
    write(tokenizers_by_pattern["gpt2"], "megatron", tmp_path)
    lines = (tmp_path / "merges.txt").read_text().splitlines()
    assert lines[0] == "#version: 0.2"
    n_merges = len(tokenizers_by_pattern["gpt2"].vocabulary.merges)
    assert len(open_tokenizer(tmp_path).vocabulary.merges) == len(lines) - 1 == n_merges
    assert any(line.startswith("#") for line in lines[1:])


def test_the_right_file_of_a_directory(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer\.json\s+cannot be read"):
        open_tokenizer(tmp_path)
    write(tokenizer, "hf", tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\x0adamaged")
    assert open_tokenizer(tmp_path).vocab_size == tokenizer.vocab_size
    assert open_tokenizer(tmp_path, end_of_document="<|endoftext|>").eod_id == tokenizer.eod_id
    with pytest.raises(TokenizerError, match=r"pattern, special tokens\s+belongs to a rank file"):
        open_tokenizer(tmp_path, "gpt2")
    with pytest.raises(TokenizerError, match=r"format rwkv\s+must be one of hf, tiktoken, megatron, sentencepiece"):
        write(tokenizer, "rwkv", tmp_path)
    assert files_of("hf", Path("a.json")) == [Path("a.json")]
    assert json.loads((tmp_path / "tokenizer.json").read_text())["model"]["type"] == "BPE"
