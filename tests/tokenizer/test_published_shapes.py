"""Tokenizers of every published byte-level shape, made small with `tokenizers`: our ids are its ids."""

import copy
import json
from itertools import pairwise
from typing import Any

import pytest
import tokenizers

from megascratch.errors import TokenizerError
from megascratch.tokenizer import Tokenizer
from megascratch.tokenizer.cutting import as_we_read_it
from megascratch.tokenizer.hugging_face import parse, render

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
GPT2 = BYTE_LEVEL | {"use_regex": True}


def split(pattern: str, behavior: str = "Isolated", *, invert: bool = False, kind: str = "Regex") -> dict[str, Any]:
    """A Split step."""
    return {"type": "Split", "pattern": {kind: pattern}, "behavior": behavior, "invert": invert}


def digits(individual: bool) -> dict[str, Any]:
    """A Digits step."""
    return {"type": "Digits", "individual_digits": individual}


CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = CL100K.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK_V3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
KIMI = r"[\p{Han}]+|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}&&[^\p{Han}]]+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+(?!\S)|\s+"
BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"

SHAPES: dict[str, list[dict[str, Any]]] = {
    "gpt2": [GPT2],
    "roberta": [GPT2 | {"add_prefix_space": True}],
    "llama3": [split(CL100K), BYTE_LEVEL],
    "qwen2": [split(QWEN2), BYTE_LEVEL],
    "cl100k as converted": [split(CL100K, "Removed", invert=True), BYTE_LEVEL],
    "tekken": [split(TEKKEN), BYTE_LEVEL],
    "starcoder": [digits(True), GPT2],
    "falcon": [
        {"type": "Punctuation", "behavior": "Contiguous"},
        GPT2,
        digits(False),
        split("[0-9][0-9][0-9]"),
    ],
    "deepseek-coder": [
        split("[\r\n]"),
        split(r"\s?\p{L}+"),
        split(r"\s?\p{P}+"),
        split(r"\s+$"),
        split("[一-龥ࠀ-一가-퟿]+"),
        digits(True),
        BYTE_LEVEL,
    ],
    "deepseek-v3": [split(r"\p{N}{1,3}"), split("[一-龥\u3040-ゟ゠-ヿ]+"), split(DEEPSEEK_V3), BYTE_LEVEL],
    "kimi": [split(KIMI), BYTE_LEVEL],
    "bloom": [split(BLOOM), BYTE_LEVEL],
    "spaces with what follows": [split(" ", "MergedWithNext", kind="String"), BYTE_LEVEL],
    "commas with what precedes": [split("[,;]", "MergedWithPrevious"), digits(False), BYTE_LEVEL],
    "between the words": [split(r"\w+", "Contiguous", invert=True), BYTE_LEVEL],
    "words alone": [split(r"\w+", "Removed", invert=True), BYTE_LEVEL],
    "runs of digits, with a prefix": [digits(False), BYTE_LEVEL | {"add_prefix_space": True}],
    "nothing but bytes": [BYTE_LEVEL],
    "sequences in sequences": [{"type": "Sequence", "pretokenizers": [digits(True), split(CL100K)]}, BYTE_LEVEL],
    "lines and hexadecimal digits": [split(r"^\h+|\h+$|\A\s+|\s+\z"), BYTE_LEVEL],
}
NORMALIZERS: dict[str, dict[str, Any]] = {
    "qwen": {"type": "NFC"},
    "nfkc": {"type": "NFKC"},
    "nfd": {"type": "NFD"},
    "nfkd": {"type": "NFKD"},
    "lines": {"type": "Replace", "pattern": {"Regex": r"\r\n?"}, "content": "\n"},
    "several": {
        "type": "Sequence",
        "normalizers": [
            {"type": "NFKC"},
            {"type": "Replace", "pattern": {"String": "  "}, "content": r"\1"},
            {"type": "Prepend", "prepend": ">"},
        ],
    },
}


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> dict[str, Any]:
    """A tokenizer.json without added tokens."""
    document = copy.deepcopy(render(tokenizer.vocabulary))
    del document["model"]["vocab"]["<|endoftext|>"]
    return document | {"added_tokens": []}


@pytest.fixture(scope="module")
def texts(mixed_text: str) -> list[str]:
    """Mixed text in uneven cuts, so that a piece begins and ends with anything."""
    text = mixed_text[:60_000]
    starts = [n * n * 7 for n in range(1, 92)]
    return ["", " ", "\n", *(text[a:b] for a, b in pairwise(starts)), mixed_text[150_000:165_000]]


def assert_same(document: dict[str, Any], texts: list[str], *, special: str = "all") -> Tokenizer:
    """Ours gives the ids of `tokenizers`, and what we write gives them too."""
    ours, oracle = Tokenizer(parse(document)), tokenizers.Tokenizer.from_str(json.dumps(document))
    written = tokenizers.Tokenizer.from_str(json.dumps(render(ours.vocabulary)))
    for text, ids in zip(texts, ours.encode_batch(texts, allowed_special=special)):
        expected = oracle.encode(text, add_special_tokens=False).ids
        assert ids.tolist() == expected, repr(text[:200])
        assert written.encode(text, add_special_tokens=False).ids == expected
    return ours


@pytest.mark.parametrize("shape", SHAPES)
def test_pre_tokenizers(shape: str, model: dict[str, Any], texts: list[str]) -> None:
    steps = SHAPES[shape]
    pre_tokenizer = steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps}
    ours = assert_same(model | {"pre_tokenizer": pre_tokenizer}, texts)
    if shape not in ("words alone", "bloom", "roberta", "runs of digits, with a prefix"):
        assert ours.decode(ours.encode(texts[-1])) == texts[-1]


@pytest.mark.parametrize("shape", NORMALIZERS)
def test_normalizers(shape: str, model: dict[str, Any], texts: list[str]) -> None:
    extra = ["e\u0301cole ﬁ ２½ 가 ẛ̣ \r\n\r x", "a  b   c"]
    assert_same(model | {"normalizer": NORMALIZERS[shape]}, [*texts, *extra])


ADDED = [
    {"content": "<mask>", "lstrip": True, "special": True},
    {"content": "<right>", "rstrip": True, "special": True},
    {"content": "<both>", "lstrip": True, "rstrip": True},
    {"content": "whole", "single_word": True},
    {"content": "  ", "normalized": True},
    {"content": "    ", "normalized": True},
    {"content": "\n\n", "normalized": False},
    {"content": "ﬁne", "normalized": True},
    {"content": "<|im_end|>", "special": True},
    {"content": "<|im_end|> and more", "normalized": False},
]
AROUND_ADDED = [
    "a <mask> b  <mask><mask> c \t\n<mask>",
    "a <right> b<right>  \u3000c<right>",
    "x \u2003<both> \n <both>y <both>",
    "whole wholes unwhole whole, whole_ (whole) whole1 éwhole whole\u0301",
    "a  b    c     d      e",
    "a <right>     b <right>   whole",
    "\n\n\n \n\n fine ﬁne finer",
    "hi<|im_end|>\n<|im_end|> and more<|im_end|> and less",
    " <mask>",
    "<right> ",
    "<both>",
    "  ",
]


@pytest.mark.parametrize("normalizer", [None, *NORMALIZERS])
@pytest.mark.parametrize("shape", ["gpt2", "roberta", "llama3"])
def test_added_tokens(shape: str, normalizer: str | None, model: dict[str, Any]) -> None:
    flags = {"special": False, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [flags | token | {"id": 2999 + n} for n, token in enumerate(ADDED)]
    steps = {"pre_tokenizer": {"type": "Sequence", "pretokenizers": SHAPES[shape]}}
    document = model | steps | {"added_tokens": added, "normalizer": normalizer and NORMALIZERS[normalizer]}
    ours = assert_same(document, AROUND_ADDED)
    assert [token.id for token in ours.vocabulary.added] == [2999 + n for n in range(len(ADDED))]
    quiet = ours.encode("a <mask> <|im_end|> and more")
    assert 2999 not in quiet and 3007 not in quiet and 3008 in quiet  # special ones only on request


LLAMA3_TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<bos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"<bos>": {"id": "<bos>", "ids": [2999], "tokens": ["<bos>"]}},
}
ROBERTA = {
    "type": "RobertaProcessing",
    "sep": ["<eos>", 3000],
    "cls": ["<bos>", 2999],
    "trim_offsets": True,
    "add_prefix_space": True,
}


@pytest.mark.parametrize(
    ("post_processor", "before", "after"),
    [
        (LLAMA3_TEMPLATE, [2999], []),
        ({"type": "Sequence", "processors": [GPT2, LLAMA3_TEMPLATE]}, [2999], []),
        (ROBERTA, [2999], [3000]),
        ({"type": "BertProcessing", "sep": ["<eos>", 3000], "cls": ["<bos>", 2999]}, [2999], [3000]),
        (GPT2, [], []),
    ],
)
def test_tokens_around_a_text_come_on_request(
    post_processor: dict[str, Any], before: list[int], after: list[int], model: dict[str, Any]
) -> None:
    added = [{"id": 2999 + n, "content": content, "special": True} for n, content in enumerate(["<bos>", "<eos>"])]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    document = model | {"added_tokens": [flags | token for token in added], "post_processor": post_processor}
    ours, oracle = Tokenizer(parse(document)), tokenizers.Tokenizer.from_str(json.dumps(document))
    for text in ("Hello there", ""):
        expected = oracle.encode(text).ids
        assert ours.encode(text, add_special_tokens=True) == expected == [*before, *ours.encode(text), *after]
    assert render(ours.vocabulary)["post_processor"] == post_processor


def test_expressions_that_mean_something_else_here() -> None:
    assert as_we_read_it(CL100K) == CL100K
    assert as_we_read_it(r"\s+$") == r"(?m)\s+$"
    assert as_we_read_it(r"[$^]\$\h[\h]") == r"[$^]\$[0-9a-fA-F][0-9a-fA-F]"
    assert as_we_read_it(r"[^[:alpha:]]") == r"[^[:alpha:]]"
    assert as_we_read_it(r"[a[bc]]\z") == r"(?V1)[a[bc]]\Z"
    for pattern in (r"\R", r"\H", r"a\K", r"\bx", r"[\W]", "[[:punct:]]", "(?mi)."):
        with pytest.raises(TokenizerError, match=r"in a pattern\s+is not supported"):
            as_we_read_it(pattern)
