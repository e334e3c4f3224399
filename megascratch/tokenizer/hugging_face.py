"""`tokenizer.json`, the format of Hugging Face's `tokenizers`: read what is BPE over bytes, or over characters with
byte fallback; refuse the rest by name.

    model           {"type": "BPE", "vocab": {"!": 0, ..., "Ġthe": 262}, "merges": [["Ġ", "t"], ["Ġt", "he"], ...]}
    pre_tokenizer   ByteLevel (cuts by GPT-2's pattern), or Split(Regex) and then ByteLevel(use_regex=false)
    added_tokens    [{"id": 50256, "content": "<|endoftext|>", "special": true, ...}]

With `"byte_fallback": true` the vocabulary is text, as SentencePiece has it: "▁the", and "<0x0A>" for a byte. The other
steps are read by `hugging_face_steps`.

A directory holds `tokenizer.json`, and beside it `tokenizer_config.json`, which names the end-of-document token.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from megascratch.errors import Problem, TokenizerError
from megascratch.tokenizer import hugging_face_steps as steps
from megascratch.tokenizer.alphabet import to_bytes
from megascratch.tokenizer.cutting import WHOLE, Normalization, Prepend
from megascratch.tokenizer.patterns import well_formed
from megascratch.tokenizer.vocabulary import (
    MAX_IDS,
    AddedToken,
    Characters,
    Vocabulary,
    byte_name,
    keys_of,
    usual_end_of_document,
)

FILE_NAME = "tokenizer.json"
CONFIG_NAME = "tokenizer_config.json"
_MAX_FILE_BYTES = 1 << 28  # 268 MB; a vocabulary of 256,000 takes about 30 MB
_BYTE_NAME = re.compile("<0x[0-9A-F]{2}>")


def read(path: Path, end_of_document: str | None = None) -> Vocabulary:
    """Read a `tokenizer.json`, or the one in a directory.

    Args:
        end_of_document: the token that ends a document; else `eos_token` of the configuration beside it, else a guess.

    Raises: TokenizerError: if the file is missing or malformed, or describes a tokenizer that we cannot run.
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
    if problems := _unsupported(model):
        raise TokenizerError(problems)
    added = tuple(sorted((_added_token(entry) for entry in document.get("added_tokens") or ()), key=lambda t: t.id))
    normalizer = steps.read_normalizer(document.get("normalizer"))
    if model.get("byte_fallback"):
        how = _character_steps(document, normalizer)
        tokens = _tokens(model["vocab"], added, _characters_of)
    else:
        byte_steps = steps.read_byte_steps(document.get("pre_tokenizer"))
        how = vars(byte_steps)
        tokens = _tokens(model["vocab"], added, _bytes_of)
    steps.read_surroundings(document.get("post_processor"))
    return Vocabulary(
        tokens=tokens,
        merges=_merges(model["merges"], model["vocab"]),
        added=added,
        whole_first=bool(model.get("ignore_merges")),
        normalizer=normalizer,
        post_processor=document.get("post_processor"),
        end_of_document=end_of_document or usual_end_of_document(added),
        **how,
    )


def render(vocabulary: Vocabulary) -> dict[str, Any]:
    """Return the `tokenizer.json` of a vocabulary, ready for `json.dump`.

    Raises: TokenizerError: if the format cannot say what the vocabulary does.
    """
    keys = keys_of(vocabulary)
    names = {id: name for name, id in keys.items()}
    added = [*vocabulary.added, *_user_defined(vocabulary)]
    over_characters = vocabulary.characters is not None
    unknown = next((token.content for token in vocabulary.added if token.content == "<unk>"), None)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [asdict(token) for token in sorted(added, key=lambda token: token.id)],
        "normalizer": steps.render_normalizer(vocabulary.normalizer),
        "pre_tokenizer": steps.render_pre_tokenizer(vocabulary),
        "post_processor": vocabulary.post_processor,
        "decoder": steps.render_decoder(vocabulary),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown if over_characters else None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": over_characters,
            "byte_fallback": over_characters,
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


def _unsupported(model: dict[str, Any]) -> list[Problem]:
    """Name everything in the model that would make our ids differ."""
    if model.get("type", "BPE") != "BPE":
        return [Problem(f"model.type = {model['type']}", "must be BPE", "other kinds of tokenizers are not supported")]
    problems = [
        Problem(f"model.{key} = {model[key]!r}", "is not supported", "must be absent or null")
        for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
        if model.get(key)
    ]
    if model.get("byte_fallback") and model.get("ignore_merges"):
        problems.append(Problem("model.ignore_merges = True", "is not supported with byte_fallback"))
    return problems


def _character_steps(document: dict[str, Any], normalizer: tuple[Normalization, ...]) -> dict[str, Any]:
    """Return the fields of a vocabulary whose merges run over characters."""
    ids = document["model"]["vocab"]
    byte_names = [byte_name(byte) for byte in range(256)]
    if missing := [name for name in byte_names if name not in ids]:
        rule = f"are not in the vocabulary, the first is {missing[0]}"
        remedy = "only a vocabulary with all of them can encode any text"
        raise TokenizerError(Problem(f"{len(missing)} of the 256 byte tokens", rule, remedy))
    names = set(byte_names)
    for entry in document["model"]["merges"]:
        if not names.isdisjoint(_pair(entry)):
            raise TokenizerError(Problem(f"merge {entry!r}", "joins a byte token, which is not supported"))
    cuts, spaces = steps.read_character_steps(document.get("pre_tokenizer"), normalizer)
    strip_first = steps.read_strip_first(document.get("decoder"), spaces)
    characters = Characters(tuple(ids[name] for name in byte_names), spaces, strip_first)
    return {"characters": characters, "cuts": cuts, "pattern": WHOLE}


def _user_defined(vocabulary: Vocabulary) -> list[AddedToken]:
    """Return the added tokens that stand for SentencePiece's user-defined pieces."""
    if vocabulary.characters is None or not vocabulary.characters.user_defined:
        return []
    if any(isinstance(step, Prepend) for step in vocabulary.normalizer):
        # The prefix would be put in front of the token's own content as well, and after each token in the text.
        problem = Problem("user-defined pieces and a space put in front", "cannot both be said in tokenizer.json")
        raise TokenizerError(problem)
    return [
        AddedToken(id, vocabulary.tokens[id].decode(), special=False, normalized=True)
        for id in vocabulary.characters.user_defined
    ]


def _added_token(entry: dict[str, Any]) -> AddedToken:
    flags = {key: bool(entry.get(key)) for key in ("special", "single_word", "lstrip", "rstrip", "normalized")}
    return AddedToken(_checked_id(entry["id"], entry["content"]), entry["content"], **flags)


def _bytes_of(name: str) -> bytes:
    try:
        return to_bytes(name)
    except KeyError as error:
        problem = Problem(f"token {name!r}", f"holds {error.args[0]!r}, which stands for no byte")
        raise TokenizerError([problem, Problem("the vocabulary", "must be byte-level")]) from None


def _characters_of(name: str) -> bytes:
    if _BYTE_NAME.fullmatch(name):
        return bytes([int(name[3:5], 16)])
    return well_formed(name).encode()


def _checked_id(id: object, name: str) -> int:
    if not isinstance(id, int) or not 0 <= id < MAX_IDS:
        raise TokenizerError(Problem(f"token {name!r}, id {id}", f"must be a whole number from 0 to {MAX_IDS - 1}"))
    return id


def _tokens(ids: dict[str, int], added: tuple[AddedToken, ...], read_name: Callable[[str], bytes]) -> list[bytes]:
    tokens = [b""] * (
        1 + max([*(_checked_id(id, name) for name, id in ids.items()), *(t.id for t in added)], default=-1)
    )
    added_ids = {token.content: token.id for token in added}
    for name, id in ids.items():
        if added_ids.get(name, id) != id:
            rule = f"has id {added_ids[name]} among the added tokens and {id} in the vocabulary"
            raise TokenizerError(Problem(f"token {name!r}", rule))
        if name in added_ids and read_name is _bytes_of:
            continue  # the name need not be in the byte alphabet, and merges find it by id
        token = read_name(name)
        if tokens[id]:
            raise TokenizerError(Problem(f"id {id}", f"is given to two tokens, {tokens[id]!r} and {token!r}"))
        tokens[id] = token
    for one in added:
        if tokens[one.id] and ids.get(one.content) != one.id:
            rule = f"is given to {one.content!r} and to the token {tokens[one.id]!r}"
            raise TokenizerError(Problem(f"id {one.id}", rule))
    return tokens


def _pair(entry: str | Sequence[str]) -> tuple[str, str]:
    left, right = entry.split(" ") if isinstance(entry, str) else entry
    return left, right


def _merges(entries: list[str] | list[list[str]], ids: dict[str, int]) -> np.ndarray[Any, np.dtype[np.int32]]:
    rows: dict[tuple[int, int], tuple[int, int, int, int]] = {}
    for rank, entry in enumerate(entries):
        left, right = _pair(entry)
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
