"""Files: ours in the hands of others, theirs in ours, and what we refuse."""

import base64
import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from tokenizers import models, pre_tokenizers, trainers

from megascratch.errors import TokenizerError
from megascratch.tokenizer import PATTERNS, AddedToken, Tokenizer
from megascratch.tokenizer.hugging_face import parse, render


@pytest.fixture(scope="module")
def document(tokenizer: Tokenizer) -> dict[str, Any]:
    """The tokenizer.json of a trained tokenizer."""
    return render(tokenizer.vocabulary)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_what_we_write_we_read(pattern: str, tokenizers_by_pattern: dict[str, Tokenizer], tmp_path: Path) -> None:
    tokenizer = tokenizers_by_pattern[pattern]
    tokenizer.save(tmp_path / "made" / "here")
    again = Tokenizer.from_file(tmp_path / "made" / "here")
    assert render(again.vocabulary) == render(tokenizer.vocabulary)
    assert (again.vocab_size, again.eod_id) == (tokenizer.vocab_size, tokenizer.eod_id)
    assert sorted(path.name for path in (tmp_path / "made" / "here").iterdir()) == [
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_transformers_reads_it(tokenizer: Tokenizer, mixed_text: str, tmp_path: Path) -> None:
    file = tokenizer.save(tmp_path)
    text = mixed_text[:200_000]
    for theirs in (
        transformers.PreTrainedTokenizerFast(tokenizer_file=str(file)),
        transformers.AutoTokenizer.from_pretrained(str(tmp_path)),
    ):
        assert theirs(text)["input_ids"] == tokenizer.encode(text, allowed_special="all")
        assert len(theirs) == tokenizer.vocab_size
    assert theirs.eos_token_id == tokenizer.eod_id


def test_byte_level_files_of_others(source_texts: list[str], mixed_text: str, tmp_path: Path) -> None:
    """A file trained by `tokenizers`: special tokens first, GPT-2's pattern inside ByteLevel."""
    oracle = tokenizers.Tokenizer(models.BPE())
    oracle.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    oracle.decoder = tokenizers.decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2000, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"], show_progress=False
    )
    oracle.train_from_iterator(source_texts[:10], trainer)
    oracle.add_tokens([tokenizers.AddedToken("self.assert", normalized=False)])
    oracle.save(str(tmp_path / "theirs.json"))
    ours = Tokenizer.from_file(tmp_path / "theirs.json")
    text = mixed_text + "</s> self.assertEqual <s>"
    assert ours.encode(text, allowed_special="all") == oracle.encode(text).ids
    assert ours.encode("self.assertTrue")[0] == 2000  # not special, so always recognised
    assert ours.special_tokens == {"<s>": 0, "</s>": 1}
    assert ours.eod_id == 1
    ours.save(tmp_path / "ours.json")
    again = tokenizers.Tokenizer.from_file(str(tmp_path / "ours.json"))
    assert again.encode(text).ids == oracle.encode(text).ids


def test_files_shaped_like_llama_3(document: dict[str, Any], mixed_text: str) -> None:
    """Added tokens outside the vocabulary, whole pieces before merges, merges as strings, a post-processor."""
    theirs = copy.deepcopy(document)
    merges = theirs["model"]["merges"]
    del theirs["model"]["vocab"]["<|endoftext|>"]
    long_name = max(theirs["model"]["vocab"], key=len)
    theirs["model"]["merges"] = [" ".join(merge) for merge in merges if "".join(merge) != long_name]
    theirs["model"]["ignore_merges"] = True
    theirs["post_processor"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    oracle = tokenizers.Tokenizer.from_str(json.dumps(theirs))
    ours = Tokenizer(parse(theirs))
    assert ours.encode(mixed_text, allowed_special="all") == oracle.encode(mixed_text).ids
    unmerged = ours.token_bytes(theirs["model"]["vocab"][long_name]).decode()
    merging = Tokenizer(parse(_changed(theirs, "model.ignore_merges", False)))
    assert len(ours.encode(unmerged)) == 1 < len(merging.encode(unmerged))
    assert render(ours.vocabulary)["post_processor"] == theirs["post_processor"]


def test_files_shaped_like_qwen(document: dict[str, Any]) -> None:
    """Text is composed before it is cut."""
    theirs = document | {"normalizer": {"type": "NFC"}}
    text = "e\u0301cole 가 <|endoftext|> n\u0303"
    ours, oracle = Tokenizer(parse(theirs)), tokenizers.Tokenizer.from_str(json.dumps(theirs))
    assert ours.encode(text, allowed_special="all") == oracle.encode(text).ids
    assert ours.decode(ours.encode(text)) == "école 가 <|endoftext|> ñ"


def test_the_end_of_a_document(document: dict[str, Any], tmp_path: Path) -> None:
    names = ["<|begin|>", "<|stop|>"]
    added = [dict(document["added_tokens"][0], id=5000 + n, content=name) for n, name in enumerate(names)]
    (tmp_path / "tokenizer.json").write_text(json.dumps(document | {"added_tokens": added}))
    assert Tokenizer.from_file(tmp_path).eod_id is None  # two unknown names: no guess
    assert Tokenizer.from_file(tmp_path, end_of_document="<|begin|>").eod_id == 5000
    with pytest.raises(TokenizerError, match=r"end-of-document token '<x>'\s+is not in the vocabulary\s+use <\|begin"):
        Tokenizer.from_file(tmp_path, end_of_document="<x>")
    for stop in ("<|stop|>", {"content": "<|stop|>"}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": stop}))
        assert Tokenizer.from_file(tmp_path).eod_id == 5001
    assert Tokenizer.from_file(tmp_path / "tokenizer.json").eod_id == 5001
    assert Tokenizer.from_file(tmp_path).vocab_size == 5002


def _changed(document: dict[str, Any], path: str, value: object) -> dict[str, Any]:
    changed = copy.deepcopy(document)
    *parents, last = path.split(".")
    at: Any = changed
    for key in parents:
        at = at[int(key)] if isinstance(at, list) else at[key]
    at[int(last) if isinstance(at, list) else last] = value
    return changed


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model.type", "Unigram", r"model\.type = Unigram\s+must be BPE"),
        ("model.dropout", 0.1, r"model\.dropout = 0\.1\s+is not supported"),
        ("model.byte_fallback", True, r"256 of the 256 byte tokens\s+are not in the vocabulary, the first is <0x00>"),
        ("model.end_of_word_suffix", "</w>", r"end_of_word_suffix = '</w>'"),
        ("added_tokens.0.id", 1 << 40, r"must be a whole number from 0 to"),
        ("added_tokens.0.id", 0, r"'<\|endoftext\|>'\s+has id 0 among the added tokens and \d+ in the vocabulary"),
        ("added_tokens.0.content", "<x>", r"id \d+\s+is given to '<x>' and to the token b'<\|endoftext\|>'"),
        ("added_tokens", [{"id": 5000, "content": ""}], r"UTF-8 can write, and not empty"),
        ("added_tokens", [{"id": 5000 + n, "content": "<x>"} for n in (0, 1)], r"'<x>'\s+is given twice"),
        ("added_tokens", [{"id": 5000, "content": name} for name in ("<x>", "<y>")], r"'<y>'\s+shares id 5000"),
        ("pre_tokenizer", None, r"pre_tokenizer = none\s+must have one ByteLevel"),
        ("pre_tokenizer", {"type": "Whitespace"}, r"pre_tokenizer = Whitespace\s+must have one ByteLevel"),
        ("pre_tokenizer.pretokenizers.0", {"type": "BertPreTokenizer"}, r"BertPreTokenizer\s+is not supported beside"),
        ("pre_tokenizer.pretokenizers.0.behavior", "Merged", r"Split of behavior Merged\s+must be one of Removed,"),
        ("pre_tokenizer.pretokenizers.0.pattern", {"Regex": "("}, r"is not a regular expression"),
        ("pre_tokenizer.pretokenizers.0.pattern", {"Regex": r"\R"}, r"\\R in a pattern\s+is not supported"),
        ("pre_tokenizer.pretokenizers.0.pattern", {"Regex": "(?m:.)"}, r"\(\?m: in a pattern\s+is not supported"),
        ("pre_tokenizer.pretokenizers.0.pattern", {"Glob": "*"}, r"pattern of kind Glob\s+must be a Regex or a String"),
        ("normalizer", {"type": "Lowercase"}, r"normalizer = Lowercase\s+is not supported, only NFC"),
        ("normalizer", {"type": "Replace", "pattern": {"Regex": "("}, "content": ""}, r"is not a regular expression"),
        ("post_processor", {"type": "Bert"}, r"post_processor = Bert\s+is not supported"),
        ("post_processor", {"type": "TemplateProcessing", "single": []}, r"must hold the text once"),
        ("model.vocab.!", 1, r"id 1\s+is given to two tokens"),
        ("model.vocab.日", 4000, r"holds '日', which stands for no byte"),
        ("model.vocab.!", "0", r"must be a whole number"),
        ("model.merges", [["Ġ", "zzz"]], r"merge 0, 'Ġ' \+ 'zzz'\s+needs 'zzz', which is not in the vocabulary"),
        ("model.merges", [["Ġ"]], r"not a tokenizer of Hugging Face's format"),
        ("model", [], r"not a tokenizer of Hugging Face's format"),
    ],
)
def test_what_we_cannot_run_is_refused_by_name(
    document: dict[str, Any], tmp_path: Path, path: str, value: object, message: str
) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(_changed(document, path, value)))
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_file(file)


def test_a_vocabulary_without_some_byte(document: dict[str, Any]) -> None:
    changed = _changed(document, "model.merges", [])
    del changed["model"]["vocab"]["!"]
    with pytest.raises(TokenizerError, match=r"1 of the 256 single bytes\s+are not in .* the first is 0x21"):
        parse(changed)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"cannot be read: No such file"),
        (b"", r"is not JSON"),
        (b"\xff\xfe\x00", r"is not JSON"),
        (b"[" * 200_000, r"is not JSON"),
        (b"[]", r"it has no model"),
        (
            b'{"model": {"vocab": {}}, "pre_tokenizer": {"type": "ByteLevel"}}',
            r"not a tokenizer of Hugging Face's format",
        ),
    ],
)
def test_damaged_files(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_file(tmp_path / "tokenizer.json")


def test_a_special_token_that_reads_as_an_ordinary_one(tokenizer: Tokenizer, tmp_path: Path) -> None:
    clash = AddedToken(tokenizer.vocab_size, "Ġdef")
    vocabulary = replace(
        tokenizer.vocabulary, tokens=[*tokenizer.vocabulary.tokens, b""], added=(*tokenizer.vocabulary.added, clash)
    )
    with pytest.raises(TokenizerError, match=r"'Ġdef'\s+is how tokenizer\.json writes an ordinary token"):
        Tokenizer(vocabulary).save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(TokenizerError, match=r"cannot be written: .*\s+choose another place"):
        tokenizer.save(tmp_path / "file" / "below")


def test_tiktoken_ranks_come_back(tokenizer: Tokenizer, mixed_text: str, tmp_path: Path) -> None:
    tokenizer.save_tiktoken(tmp_path / "a.tiktoken")
    again = Tokenizer.from_tiktoken(tmp_path / "a.tiktoken", "cl100k", tokenizer.special_tokens)
    assert again.encode(mixed_text) == tokenizer.encode(mixed_text)
    assert again.eod_id == tokenizer.eod_id
    again.save_tiktoken(tmp_path / "b.tiktoken")
    assert (tmp_path / "a.tiktoken").read_bytes() == (tmp_path / "b.tiktoken").read_bytes()
    oracle = tokenizers.Tokenizer.from_file(str(again.save(tmp_path / "a.json")))
    assert oracle.encode(mixed_text).ids == tokenizer.encode(mixed_text, allowed_special="all")


def test_merges_that_ranks_cannot_tell(document: dict[str, Any], tmp_path: Path) -> None:
    backwards = _changed(document, "model.merges", document["model"]["merges"][::-1])
    with pytest.raises(TokenizerError, match="its merges do not run in the order of its ids"):
        Tokenizer(parse(backwards)).save_tiktoken(tmp_path / "a.tiktoken")
    missing = _changed(document, "model.merges", document["model"]["merges"][:-1])
    with pytest.raises(TokenizerError, match="is not what its own bytes encode to"):
        Tokenizer(parse(missing)).save_tiktoken(tmp_path / "a.tiktoken")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("extra", "special", "message"),
    [
        (b"IQ==\n", {}, r"line 257\s+must be a token in base64"),
        (b"!!! 256\n", {}, r"line 257\s+must be a token in base64"),
        (b"IQ== 256\n", {}, r"line 257\s+must be a new token"),
        (b"YWE= -1\n", {}, r"line 257\s+must be a new token"),
        (b"YWE= 99999999999\n", {}, r"line 257\s+must be a new token"),
        (b"YWE= 0\n", {}, r"a rank\s+is given to two tokens"),
        (b"", {"<x>": 3}, r"special token <x> = 3\s+has the id of a token"),
        (b"", {"<x>": 256, "<y>": 256}, r"special tokens\s+must have different ids"),
    ],
)
def test_bad_rank_files(tmp_path: Path, extra: bytes, special: dict[str, int], message: str) -> None:
    ranks = b"".join(b"%s %d\n" % (base64.b64encode(bytes([byte])), byte) for byte in range(256))
    (tmp_path / "a.tiktoken").write_bytes(ranks + extra)
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_tiktoken(tmp_path / "a.tiktoken", "gpt2", special)


def test_a_missing_rank_file(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="cannot be read: No such file"):
        Tokenizer.from_tiktoken(tmp_path / "a.tiktoken", "gpt2", {})
