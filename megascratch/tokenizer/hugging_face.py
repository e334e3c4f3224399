"""`tokenizer.json`, the format of Hugging Face's `tokenizers`: read what is byte-level BPE, refuse the rest by name.

    model           {"type": "BPE", "vocab": {"!": 0, ..., "Ġthe": 262}, "merges": [["Ġ", "t"], ["Ġt", "he"], ...]}
    pre_tokenizer   ByteLevel (cuts by GPT-2's pattern), or Split(Regex) and then ByteLevel(use_regex=false)
    added_tokens    [{"id": 50256, "content": "<|endoftext|>", "special": true, ...}]

A directory holds `tokenizer.json`, and beside it `tokenizer_config.json`, which names the end-of-document token.
"""

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megascratch.errors import Problem, TokenizerError
from megascratch.tokenizer.alphabet import to_bytes
from megascratch.tokenizer.patterns import PATTERNS
from megascratch.tokenizer.vocabulary import MAX_IDS, AddedToken, Vocabulary, keys_of, usual_end_of_document

FILE_NAME = "tokenizer.json"
CONFIG_NAME = "tokenizer_config.json"
_MAX_FILE_BYTES = 1 << 28  # 268 MB; a vocabulary of 256,000 takes about 30 MB


def read(path: Path, end_of_document: str | None = None) -> Vocabulary:
    """Read a `tokenizer.json`, or the one in a directory.

    Args:
        end_of_document: the token that ends a document; else `eos_token` of the configuration beside it, else a guess.

    Raises: TokenizerError: if the file is missing or malformed, or describes a tokenizer that is not byte-level BPE.
    """
    file = path / FILE_NAME if path.is_dir() else path
    document = _load_json(file)
    try:
        if end_of_document is None and file.name == FILE_NAME:
            end_of_document = _configured_end(file.with_name(CONFIG_NAME), document)
        return parse(document, end_of_document)
    except TokenizerError as error:
        raise TokenizerError(error.problems, where=str(file)) from None
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise TokenizerError(
            Problem("the file", f"is not a tokenizer of Hugging Face's format ({type(error).__name__}: {error})"),
            where=str(file),
        ) from error


def parse(document: dict[str, Any], end_of_document: str | None = None) -> Vocabulary:
    """Build the vocabulary from a parsed `tokenizer.json`.

    Raises: TokenizerError: if it describes what we cannot run; KeyError and its like where the structure is not there.
    """
    model = document["model"]
    if problems := _unsupported(model, document):
        raise TokenizerError(problems)
    added = tuple(sorted((_added_token(entry) for entry in document.get("added_tokens") or ()), key=lambda t: t.id))
    ids: dict[str, int] = model["vocab"]
    return Vocabulary(
        tokens=_tokens(ids, added),
        merges=_merges(model["merges"], ids),
        added=added,
        pattern=_pattern(document.get("pre_tokenizer")),
        whole_first=bool(model.get("ignore_merges")),
        normalizer=_normalizer(document.get("normalizer")),
        post_processor=document.get("post_processor"),
        end_of_document=end_of_document or usual_end_of_document(added),
    )


def render(vocabulary: Vocabulary) -> dict[str, Any]:
    """Return the `tokenizer.json` of a vocabulary, ready for `json.dump`."""
    keys = keys_of(vocabulary)
    names = {id: name for name, id in keys.items()}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    pre_tokenizer: dict[str, Any] = byte_level | {"use_regex": True}
    if vocabulary.pattern != PATTERNS["gpt2"]:
        split = {
            "type": "Split",
            "pattern": {"Regex": vocabulary.pattern},
            "behavior": "Isolated",
            "invert": False,
        }
        pre_tokenizer = {"type": "Sequence", "pretokenizers": [split, byte_level | {"use_regex": False}]}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": token.id, "content": token.content, **flags, "special": token.special} for token in vocabulary.added
        ],
        "normalizer": {"type": vocabulary.normalizer} if vocabulary.normalizer else None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": vocabulary.post_processor,
        "decoder": byte_level | {"use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": vocabulary.whole_first,
            "vocab": keys,
            "merges": [[names[left], names[right]] for left, right, _, _ in vocabulary.merges.tolist()],
        },
    }


def render_config(vocabulary: Vocabulary) -> dict[str, Any]:
    """Return the `tokenizer_config.json` that makes the directory load with `transformers.AutoTokenizer`."""
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    return config | ({"eos_token": vocabulary.end_of_document} if vocabulary.end_of_document else {})


def _load_json(file: Path) -> dict[str, Any]:
    try:
        if file.stat().st_size > _MAX_FILE_BYTES:
            raise TokenizerError(Problem(str(file), f"is over {_MAX_FILE_BYTES >> 20} MiB", "is this a tokenizer?"))
        document = json.loads(file.read_bytes())
    except OSError as error:
        remedy = "train one with `megascratch tokenizer train`, or correct the path"
        raise TokenizerError(Problem(str(file), f"cannot be read: {error.strerror}", remedy)) from None
    except (ValueError, RecursionError) as error:
        raise TokenizerError(Problem(str(file), f"is not JSON: {error}")) from None
    if not isinstance(document, dict) or (file.name != CONFIG_NAME and "model" not in document):
        raise TokenizerError(Problem(str(file), "is not a tokenizer of Hugging Face's format: it has no model"))
    return document


def _configured_end(file: Path, document: dict[str, Any]) -> str | None:
    """Return the `eos_token` of a configuration, if there is one and it is an added token."""
    if not file.is_file():
        return None
    end = _load_json(file).get("eos_token")
    content = end.get("content") if isinstance(end, dict) else end
    return next((t["content"] for t in document.get("added_tokens") or () if t["content"] == content), None)


def _unsupported(model: dict[str, Any], document: dict[str, Any]) -> list[Problem]:
    """Name everything in the file that would make our ids differ."""
    if model.get("type", "BPE") != "BPE":
        return [Problem(f"model.type = {model['type']}", "must be BPE", "only byte-level BPE tokenizers are supported")]
    problems = [
        Problem(f"model.{key} = {model[key]!r}", "is not supported", "must be absent or null")
        for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
        if model.get(key)
    ]
    for entry in document.get("added_tokens") or ():
        problems += [
            Problem(f"added token {entry['content']!r}", f"has {flag} = true, which is not supported")
            for flag in ("single_word", "lstrip", "rstrip")
            if entry.get(flag)
        ]
    return problems


def _added_token(entry: dict[str, Any]) -> AddedToken:
    return AddedToken(_checked_id(entry["id"], entry["content"]), entry["content"], bool(entry.get("special")))


def _checked_id(id: object, name: str) -> int:
    if not isinstance(id, int) or not 0 <= id < MAX_IDS:
        raise TokenizerError(Problem(f"token {name!r}, id {id}", f"must be a whole number from 0 to {MAX_IDS - 1}"))
    return id


def _tokens(ids: dict[str, int], added: tuple[AddedToken, ...]) -> list[bytes]:
    tokens = [b""] * (
        1 + max([*(_checked_id(id, name) for name, id in ids.items()), *(t.id for t in added)], default=-1)
    )
    added_ids = {token.content: token.id for token in added}
    for characters, id in ids.items():
        if characters in added_ids:
            if added_ids[characters] == id:
                continue
            rule = f"has id {added_ids[characters]} among the added tokens and {id} in the vocabulary"
            raise TokenizerError(Problem(f"token {characters!r}", rule))
        try:
            token = to_bytes(characters)
        except KeyError as error:
            problem = Problem(f"token {characters!r}", f"holds {error.args[0]!r}, which stands for no byte")
            raise TokenizerError([problem, Problem("the vocabulary", "must be byte-level")]) from None
        if tokens[id]:
            raise TokenizerError(Problem(f"id {id}", f"is given to two tokens, {tokens[id]!r} and {token!r}"))
        tokens[id] = token
    for special in added:
        if tokens[special.id]:
            raise TokenizerError(
                Problem(f"id {special.id}", f"is given to {special.content!r} and to the token {tokens[special.id]!r}")
            )
    return tokens


def _merges(entries: list[str] | list[list[str]], ids: dict[str, int]) -> np.ndarray[Any, np.dtype[np.int32]]:
    rows: dict[tuple[int, int], tuple[int, int, int, int]] = {}
    for rank, entry in enumerate(entries):
        left, right = entry.split(" ") if isinstance(entry, str) else entry
        try:
            pair = ids[left], ids[right]
            merged = ids[left + right]
        except KeyError as error:
            raise TokenizerError(
                Problem(
                    f"merge {rank}, {left!r} + {right!r}", f"needs {error.args[0]!r}, which is not in the vocabulary"
                )
            ) from None
        rows.pop(pair, None)  # a pair given twice keeps its last rank, as `tokenizers` has it
        rows[pair] = (*pair, merged, rank)
    return np.array(list(rows.values()), np.int32).reshape(-1, 4)


def _pattern(pre_tokenizer: dict[str, Any] | None) -> str:
    """Return the pattern that a ByteLevel, or a Split and a ByteLevel, cuts by."""
    steps = [] if pre_tokenizer is None else pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        pattern = PATTERNS["gpt2"]
    elif kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
        pattern = _split_pattern(steps[0])
    else:
        raise TokenizerError(
            Problem(
                f"pre_tokenizer = {' + '.join(kinds) or 'none'}",
                "must be ByteLevel, or Split and ByteLevel(use_regex=false)",
                "only byte-level BPE tokenizers are supported",
            )
        )
    if steps[-1].get("add_prefix_space"):
        raise TokenizerError(Problem("pre_tokenizer.add_prefix_space = true", "is not supported", "must be false"))
    return pattern


def _split_pattern(split: dict[str, Any]) -> str:
    pattern, behavior, invert = split["pattern"], split["behavior"], split.get("invert", False)
    if "Regex" not in pattern or behavior != "Isolated" or invert:
        raise TokenizerError(
            Problem(
                f"Split of behavior {behavior}, invert {invert}", "must split by a Regex, Isolated and not inverted"
            )
        )
    return str(pattern["Regex"])


def _normalizer(normalizer: dict[str, Any] | None) -> Literal["NFC"] | None:
    if normalizer is None or (normalizer["type"] == "Sequence" and not normalizer["normalizers"]):
        return None
    if normalizer["type"] == "NFC":
        return "NFC"
    raise TokenizerError(Problem(f"normalizer = {normalizer['type']}", "is not supported", "must be absent or NFC"))
