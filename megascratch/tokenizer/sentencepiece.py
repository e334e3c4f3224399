"""`tokenizer.model`, the format of SentencePiece: a protocol buffer of pieces with scores, read without its schema.

    field 1, repeated   a piece: 1 text "▁the", 2 score −259.0, 3 type
                        (1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte)
    field 2             training: 3 model type (2 is BPE), 35 byte fallback, 46 and 47 names of begin and end
    field 3             normalising: 2 table of replacements, 3 a space in front, 4 no double spaces, 5 spaces as ▁

There are no merges in it. SentencePiece joins any two neighbours that together are a piece, the highest score first; as
merges, that is every split of every piece into two, all splits of one score being of one rank.
"""

import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megascratch.errors import Problem, TokenizerError
from megascratch.tokenizer.cutting import SPACE, WHOLE, Normalization, Prepend, Replace
from megascratch.tokenizer.vocabulary import (
    MAX_IDS,
    AddedToken,
    Characters,
    Vocabulary,
    byte_name,
    usual_end_of_document,
)

_MAX_FILE_BYTES = 1 << 25  # 34 MB; Gemma's 256,000 pieces take 4 MB
_MAX_PIECE_BYTES = 256  # the splits of a piece cost its length squared
_MAX_VARINT_BYTES = 10
_BPE = 2
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types
_FIXED_SIZES = {_FIXED64: 8, _FIXED32: 4}


@dataclass(frozen=True)
class _Piece:
    text: str
    score: float
    kind: int


@dataclass
class _Model:
    """What a file says, with the defaults of the format."""

    pieces: list[_Piece] = field(default_factory=list)
    training: dict[int, Any] = field(default_factory=dict)
    normalizing: dict[int, Any] = field(default_factory=dict)
    denormalizing: dict[int, Any] = field(default_factory=dict)


def is_model(path: Path) -> bool:
    """Whether a file begins as a model does: with a piece, where a rank file has text in base64."""
    try:
        with path.open("rb") as file:
            return file.read(1) == b"\n"
    except OSError:
        return False


def read(path: Path, end_of_document: str | None = None) -> Vocabulary:
    """Read a `tokenizer.model` of the kind BPE with byte fallback, as Llama 2, Mistral and Gemma have it.

    Args:
        end_of_document: the token that ends a document; else the model's end of sentence.

    Raises: TokenizerError: if the file is missing or malformed, or says what we cannot do.
    """
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise TokenizerError(Problem(str(path), f"is over {_MAX_FILE_BYTES >> 20} MiB", "is this a tokenizer?"))
        data = path.read_bytes()
    except OSError as error:
        raise TokenizerError(Problem(str(path), f"cannot be read: {error.strerror}", "correct the path")) from None
    try:
        model = _parse(data)
        if problems := _unsupported(model):
            raise TokenizerError(problems)
        return _vocabulary(model, end_of_document)
    except TokenizerError as error:
        raise TokenizerError(error.problems, where=str(path)) from None
    except (ValueError, TypeError, UnicodeDecodeError, struct.error) as error:
        problem = Problem("the file", f"is not a model of SentencePiece: {error}")
        raise TokenizerError(problem, where=str(path)) from None


def _parse(data: bytes) -> _Model:
    model = _Model()
    for number, value in _fields(data):
        match number:
            case 1:
                if len(model.pieces) >= MAX_IDS:
                    raise ValueError(f"it holds more than {MAX_IDS:,} pieces")
                model.pieces.append(_piece(value))
            case 2:
                model.training = dict(_fields(value))
            case 3:
                model.normalizing = dict(_fields(value))
            case 5:
                model.denormalizing = dict(_fields(value))
    if not model.pieces:
        raise ValueError("it holds no pieces")
    return model


def _piece(data: bytes) -> _Piece:
    fields = dict(_fields(data))
    text = bytes(fields.get(1, b"")).decode()
    [score] = struct.unpack("<f", fields.get(2, bytes(4)))
    return _Piece(text, score, fields.get(3, _NORMAL))


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Yield number and value of each field: an int, or the bytes of what is fixed or measured."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        wire_type = tag & 7
        if wire_type == _VARINT:
            value, at = _varint(data, at)
            yield tag >> 3, value
            continue
        if wire_type == _BYTES:
            size, at = _varint(data, at)
        elif wire_type in _FIXED_SIZES:
            size = _FIXED_SIZES[wire_type]
        else:
            raise ValueError(f"wire type {wire_type} at byte {at}")
        if size > len(data) - at:
            raise ValueError(f"the field at byte {at} is cut off")
        yield tag >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for n, byte in enumerate(data[at : at + _MAX_VARINT_BYTES]):
        value |= (byte & 0x7F) << 7 * n
        if byte < 0x80:
            return value, at + n + 1
    raise ValueError(f"the number at byte {at} is cut off")


def _unsupported(model: _Model) -> list[Problem]:
    """Name everything in the model that would make our ids differ."""
    problems = []
    if (kind := model.training.get(3, 1)) != _BPE:
        name = {1: "unigram", 3: "word", 4: "character"}.get(kind, str(kind))
        problems.append(Problem(f"model type {name}", "must be BPE", "other kinds of tokenizers are not supported"))
    if not model.training.get(35, False):
        problems.append(Problem("byte_fallback = false", "must be true", "without it not every text can be encoded"))
    if model.training.get(24, False):
        problems.append(Problem("treat_whitespace_as_suffix = true", "is not supported"))
    if not model.normalizing.get(5, True):
        problems.append(Problem("escape_whitespaces = false", "is not supported"))
    if model.normalizing.get(2) or model.denormalizing.get(2):
        name = bytes(model.normalizing.get(1, b"")).decode()
        rule = "is not supported, only identity is"
        problems.append(Problem(f"normalization by the table {name}", rule, "convert the model to tokenizer.json"))
    for id, piece in enumerate(model.pieces):
        if piece.kind not in (_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE):
            problems.append(Problem(f"piece {id}, {piece.text!r}", f"is of type {piece.kind}, which is not supported"))
        elif not 0 < len(piece.text.encode()) <= _MAX_PIECE_BYTES or not np.isfinite(piece.score):
            rule = f"must be 1 to {_MAX_PIECE_BYTES} bytes long, with a finite score"
            problems.append(Problem(f"piece {id}, {piece.text[:40]!r}", rule))
        if len(problems) > 5:
            break
    return problems or _inconsistent(model)


def _inconsistent(model: _Model) -> list[Problem]:
    """Name what contradicts itself among the pieces."""
    texts = {piece.text for piece in model.pieces}
    if len(texts) < len(model.pieces):
        return [Problem("a piece", "is given twice")]
    names = {byte_name(byte) for byte in range(256)}
    named = {piece.text for piece in model.pieces if piece.kind == _BYTE}
    if named != names:
        return [Problem(f"{len(named)} byte pieces", f"must be the 256 from {byte_name(0)} to {byte_name(255)}")]
    normal = {piece.text for piece in model.pieces if piece.kind == _NORMAL}
    for text in normal:
        # SentencePiece would join such a character by its text; our merges know it only as bytes.
        if missing := [character for character in text if character not in normal]:
            return [Problem(f"piece {text!r}", f"holds {missing[0]!r}, which is no piece", "is the model damaged?")]
    return []


def _vocabulary(model: _Model, end_of_document: str | None) -> Vocabulary:
    ids = {piece.text: id for id, piece in enumerate(model.pieces)}
    added = tuple(
        AddedToken(id, piece.text) for id, piece in enumerate(model.pieces) if piece.kind in (_UNKNOWN, _CONTROL)
    )
    tokens = [_token(piece) for piece in model.pieces]
    begin, end = (_control(model, number, usual) for number, usual in ((46, b"<s>"), (47, b"</s>")))
    prefix, single_spaces = (bool(model.normalizing.get(number, True)) for number in (3, 4))
    return Vocabulary(
        tokens=tokens,
        merges=_merges({piece.text: piece.score for piece in model.pieces if piece.kind == _NORMAL}, ids),
        added=added,
        pattern=WHOLE,
        normalizer=_normalizer(prefix, single_spaces),
        characters=Characters(
            byte_ids=tuple(ids[byte_name(byte)] for byte in range(256)),
            strip_first=prefix or single_spaces,
            user_defined=tuple(id for id, piece in enumerate(model.pieces) if piece.kind == _USER_DEFINED),
        ),
        post_processor=None if begin is None else _beginning(begin, ids[begin]),
        end_of_document=end_of_document or end or usual_end_of_document(added),
    )


def _token(piece: _Piece) -> bytes:
    if piece.kind == _BYTE:
        return bytes([int(piece.text[3:5], 16)])
    return piece.text.encode() if piece.kind in (_NORMAL, _USER_DEFINED) else b""


def _control(model: _Model, number: int, usual: bytes) -> str | None:
    """Return the control piece that a field of the training names, None where there is no such piece."""
    name = bytes(model.training.get(number, usual)).decode()
    return name if any(piece.text == name and piece.kind == _CONTROL for piece in model.pieces) else None


def _normalizer(prefix: bool, single_spaces: bool) -> tuple[Normalization, ...]:
    steps: list[Normalization] = []
    if single_spaces:
        steps += [Replace(r"\A +|[ ▁]+\z", "", is_expression=True), Replace(" {2,}", " ", is_expression=True)]
    if prefix:
        steps.append(Prepend(SPACE))
    return (*steps, Replace(" ", SPACE))


def _merges(scores: Mapping[str, float], ids: Mapping[str, int]) -> NDArray[np.int32]:
    """Return every split of every piece into two pieces, [merges, 4]; equal scores are one rank."""
    _, ranks = np.unique(-np.array(list(scores.values()), np.float32), return_inverse=True)
    rank_of = dict(zip(scores, ranks.tolist()))
    rows = [
        (ids[text[:cut]], ids[text[cut:]], ids[text], rank_of[text])
        for text in sorted(scores, key=lambda text: (rank_of[text], ids[text]))
        for cut in range(1, len(text))
        if text[:cut] in scores and text[cut:] in scores
    ]
    return np.array(rows, np.int32).reshape(-1, 4)


def _beginning(content: str, id: int) -> dict[str, Any]:
    """Return the post-processor that puts a token in front, as Hugging Face's conversions of such models have it."""
    special = {"SpecialToken": {"id": content, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": type_id}} for type_id, name in enumerate("AB"))
    return {
        "type": "TemplateProcessing",
        "single": [special, first],
        "pair": [special, first, {"SpecialToken": {"id": content, "type_id": 1}}, second],
        "special_tokens": {content: {"id": content, "ids": [id], "tokens": [content]}},
    }


def render(vocabulary: Vocabulary) -> bytes:
    """Return the model file of a vocabulary, without the notes on its training.

    Raises: TokenizerError: if SentencePiece would encode differently with it.
    """
    characters = vocabulary.characters
    if characters is None:
        raise _no_model("its merges run over bytes, not over characters")
    if vocabulary.cuts or characters.spaces is not None:
        raise _no_model("its text is cut before the merging, or its spaces are not written by the normaliser")
    switches = {
        _normalizer(prefix, single_spaces): (prefix, single_spaces)
        for prefix in (False, True)
        for single_spaces in (False, True)
    }
    if vocabulary.normalizer not in switches:
        raise _no_model("its normaliser does more than write spaces")
    if any(not token.special for token in vocabulary.added):
        raise _no_model("it has added tokens that are not special")
    unknown = next((token.id for token in vocabulary.added if token.content == "<unk>"), None)
    if unknown is None:
        raise _no_model("it has no <unk>")
    scores = _scores(vocabulary)
    pieces = _render_pieces(vocabulary, characters, scores)
    prefix, single_spaces = switches[vocabulary.normalizer]
    training: list[tuple[int, int | float | bytes]] = [(3, _BPE), (4, len(pieces)), (35, 1), (40, unknown)]
    before = (vocabulary.post_processor or {}).get("special_tokens", {})
    for numbers, held in (((41, 46), before), ((42, 47), [vocabulary.end_of_document])):
        token = next((token for token in vocabulary.added if token.content in held), None)
        if token is not None:
            training += [(numbers[0], token.id), (numbers[1], token.content.encode())]
    normalizing: list[tuple[int, int | float | bytes]] = [
        (1, b"identity"),
        (3, int(prefix)),
        (4, int(single_spaces)),
        (5, 1),
    ]
    return _message([*((1, piece) for piece in pieces), (2, _message(training)), (3, _message(normalizing))])


def _scores(vocabulary: Vocabulary) -> dict[int, float]:
    """Return the score of each piece that a merge yields: minus its place in the order of the merges."""
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for _, _, id, rank in vocabulary.merges.tolist():
        first.setdefault(id, rank)
        last[id] = rank
    in_order = sorted(first, key=first.__getitem__)
    if any(last[before] > first[after] for before, after in pairwise(in_order)):
        raise _no_model("its merges do not run token by token")
    place = {rank: -float(n) for n, rank in enumerate(sorted(set(first.values())))}
    lowest = -float(len(place))  # of what no merge yields: the characters
    texts = {vocabulary.tokens[id].decode(): id for id in _normal_ids(vocabulary)}
    scores = {id: place[first[id]] if id in first else lowest for id in texts.values()}
    splits = _merges({text: scores[id] for text, id in texts.items()}, texts)
    if set(map(tuple, splits[:, :3].tolist())) != set(map(tuple, vocabulary.merges[:, :3].tolist())):
        raise _no_model("its merges are not all the splits of its tokens")
    return scores


def _normal_ids(vocabulary: Vocabulary) -> list[int]:
    assert vocabulary.characters is not None
    others = {*vocabulary.characters.byte_ids, *vocabulary.characters.user_defined, *(t.id for t in vocabulary.added)}
    return [id for id, token in enumerate(vocabulary.tokens) if token and id not in others]


def _render_pieces(vocabulary: Vocabulary, characters: Characters, scores: Mapping[int, float]) -> list[bytes]:
    pieces: dict[int, tuple[bytes, float, int]] = {}
    pieces |= {id: (vocabulary.tokens[id], score, _NORMAL) for id, score in scores.items()}
    pieces |= {id: (vocabulary.tokens[id], 0.0, _USER_DEFINED) for id in characters.user_defined}
    pieces |= {id: (byte_name(byte).encode(), 0.0, _BYTE) for byte, id in enumerate(characters.byte_ids)}
    for token in vocabulary.added:
        pieces[token.id] = token.content.encode(), 0.0, _UNKNOWN if token.content == "<unk>" else _CONTROL
    if missing := set(range(len(vocabulary.tokens))) - set(pieces):
        raise _no_model(f"id {min(missing)} stands for nothing")
    ordered = (pieces[id] for id in range(len(vocabulary.tokens)))
    return [_message([(1, text), (2, score), (3, kind)]) for text, score, kind in ordered]


def _message(fields: Iterable[tuple[int, int | float | bytes]]) -> bytes:
    return b"".join(_field(number, value) for number, value in fields)


def _field(number: int, value: int | float | bytes) -> bytes:
    match value:
        case bytes():
            return _render_varint(number << 3 | _BYTES) + _render_varint(len(value)) + value
        case float():
            return _render_varint(number << 3 | _FIXED32) + struct.pack("<f", value)
        case _:
            return _render_varint(number << 3 | _VARINT) + _render_varint(value % (1 << 64))


def _render_varint(value: int) -> bytes:
    data = bytearray()
    while value >= 0x80:
        data.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*data, value])


def _no_model(reason: str) -> TokenizerError:
    problem = Problem(
        "this tokenizer", f"cannot be written as a SentencePiece model: {reason}", "export tokenizer.json"
    )
    return TokenizerError(problem)
