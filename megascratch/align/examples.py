"""Examples: records as token ids, with what is learned of them, cut to the length of a row.

Each stretch of text is encoded for itself, so the model learns to go on behind the very tokens that it will be given as
a prompt. By hand, ChatML, • marks what is learned (the mask belongs to the token that is predicted):

    ids       <|im_start|> user \\n Hi <|im_end|> \\n <|im_start|> assistant \\n Hello !  <|im_end|> \\n
    learned                                                                     •     •  •          •

A record that cannot be used is reported with its file and line and left out, or, where the recipe is strict, ends the
run before it begins. Data of which nothing is left, as under a template that writes no assistant turn, always does.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from megascratch.align.conversations import Demand, Piece
from megascratch.align.records import read_records
from megascratch.config import ChatConfig, Config
from megascratch.errors import ConfigError, DataError, Problem, TokenizerError, UserError
from megascratch.tokenizer import Tokenizer, formats
from megascratch.tokenizer.chat import PRESETS, ChatTemplate

Reader = Callable[[Mapping[str, Any], ChatTemplate], Demand]
_SHOWN = 10
_ENCODED_TOGETHER = 1024


@dataclass(frozen=True)
class TokenSequence:
    """Token ids [n] int32, and which of them are to be predicted, [n] bool."""

    ids: NDArray[np.int32]
    learned: NDArray[np.bool_]

    @property
    def n_places(self) -> int:
        """Inputs that it takes: the last token is predicted only."""
        return len(self.ids) - 1


@dataclass(frozen=True)
class Example:
    """Sequences that belong together, such as a chosen and a rejected answer.

    Attributes:
        where: file and line.
        sequences: each with something to learn.
        values: numbers that belong to it.
    """

    where: str
    sequences: tuple[TokenSequence, ...]
    values: Mapping[str, float]

    @property
    def n_places(self) -> int:
        """Inputs that its sequences take together."""
        return sum(sequence.n_places for sequence in self.sequences)


def open_template(config: Config) -> ChatTemplate:
    """Return the template that a recipe names: a preset, a file of Jinja, a folder, or the tokenizer's own.

    Raises: ConfigError: if the recipe names no tokenizer. TokenizerError: if there is no such template.
    """
    tokenizer, chat = _tokenizer_path(config), config.chat or ChatConfig()
    folder = tokenizer if tokenizer.is_dir() else tokenizer.parent
    special = _special_tokens(tokenizer)
    if chat.template is None:
        return ChatTemplate.from_folder(folder)
    if chat.template in PRESETS:
        return ChatTemplate.preset(chat.template, special)
    path = Path(chat.template)
    if path.is_file():
        return ChatTemplate({"default": path.read_text(encoding="utf-8")}, special)
    if path.is_dir():
        return ChatTemplate.from_folder(path)
    rule = f"is no preset ({', '.join(PRESETS)}), file or folder"
    raise TokenizerError(Problem(f"chat.template = {chat.template}", rule, "give one of them"))


def _special_tokens(tokenizer: Path) -> dict[str, str]:
    """Return what presets call eos_token, as the tokenizer has it."""
    opened = formats.open_tokenizer(tokenizer)
    return {} if opened.eod_id is None else {"eos_token": opened.decode([opened.eod_id])}


def _tokenizer_path(config: Config) -> Path:
    if config.data.tokenizer is None:
        raise ConfigError(Problem("data.tokenizer", "must be given", "conversations are read as text"))
    return Path(config.data.tokenizer)


def read_examples(config: Config, reader: Reader, console: Console, *, scored: bool = False) -> list[Example]:
    """Read everything that `data.paths` names.

    Args:
        config: resolved; `data.seq_length` is the longest that an example's sequence may be.
        reader: what each record is read as.
        console: for what is left out.
        scored: whether a scalar head is to see whole sequences: each has a place for its last token, and that one
            alone is learned.

    Raises: DataError: if nothing can be used or, in a strict recipe, if anything cannot. TokenizerError: if tokenizer
        or template cannot be used.
    """
    tokenizer, template = formats.open_tokenizer(_tokenizer_path(config)), open_template(config)
    chat = config.chat or ChatConfig()
    problems: list[Problem] = []
    examples: list[Example] = []
    waiting: list[tuple[str, Demand]] = []
    strict = chat.strict

    for record in read_records(config.data.paths):
        if isinstance(record.value, Problem):
            problems.append(_led(record.where, record.value))
            continue
        try:
            waiting.append((record.where, reader(record.value, template)))
        except (DataError, TokenizerError) as error:
            problems += [_led(record.where, problem) for problem in error.problems]
    for start in range(0, len(waiting), _ENCODED_TOGETHER):
        some = waiting[start : start + _ENCODED_TOGETHER]
        for (where, demand), sequences in zip(some, _encoded(tokenizer, [demand for _, demand in some])):
            try:
                example = _example(where, sequences, demand.values, config.data.seq_length + (not scored), chat)
                example = _scored(example) if scored else example
                _require_room(example, config.data.seq_length, chat)
                examples.append(example)
            except DataError as error:
                problems += [_led(where, problem) for problem in error.problems]
                strict |= isinstance(error, TooLong) and chat.truncation == "error"
    _report(problems, len(examples), strict, console)
    return examples


class TooLong(DataError):
    """A sequence has more tokens than a row has places."""


def _example(
    where: str, sequences: Sequence[TokenSequence], values: Mapping[str, float], longest: int, chat: ChatConfig
) -> Example:
    """Return what is kept of a record's sequences.

    Raises: DataError: if that is not enough to learn from.
    """
    cut = tuple(truncated(sequence, longest, chat.truncation) for sequence in sequences)
    if not all(sequence.learned.any() for sequence in cut):
        remedy = "raise data.seq_length, or use chat.truncation = keep_end"
        raise DataError(Problem("none of the tokens kept", "is to be learned", remedy))
    if len(cut) == 2 and np.array_equal(cut[0].ids, cut[1].ids):
        raise DataError(Problem("chosen and rejected", "are the same tokens", "leave the pair out"))
    return Example(where, cut, values)


def _require_room(example: Example, seq_length: int, chat: ChatConfig) -> None:
    """Check that an example's sequences fit into one row where it must have no more.

    Raises: TooLong: if they do not.
    """
    if chat.packing and example.n_places > seq_length:
        remedy = "raise data.seq_length, or set chat.packing = false"
        raise TooLong(Problem(f"{example.n_places:,} places", f"do not fit into a row of {seq_length:,}", remedy))


def _scored(example: Example) -> Example:
    """Let every token be read, and the last one's place be what counts: it 'predicts' a token that is not there."""
    sequences = tuple(
        TokenSequence(np.append(s.ids, np.int32(0)), np.append(np.zeros(len(s.ids), np.bool_), True))
        for s in example.sequences
    )
    return replace(example, sequences=sequences)


def _report(problems: Sequence[Problem], n_examples: int, strict: bool, console: Console) -> None:
    if not problems and n_examples:
        return
    shown = list(problems[:_SHOWN])
    if len(problems) > len(shown):
        shown.append(Problem(f"and {len(problems) - len(shown):,} more", "of the same kinds or others"))
    if n_examples == 0:
        raise DataError(
            shown or Problem("no record", "is in the files", "give data.paths"), "data.paths: nothing is left"
        )
    if strict:
        raise DataError(shown, "data.paths")
    console.print(f"left out, {n_examples:,} examples remain: {UserError(shown, 'data.paths')}")


def _led(where: str, problem: Problem) -> Problem:
    return Problem(f"{where}: {problem.value}", problem.rule, problem.remedy)


def _encoded(tokenizer: Tokenizer, demands: Sequence[Demand]) -> list[tuple[TokenSequence, ...]]:
    """Encode the pieces of many records in one call."""
    pieces = [piece for demand in demands for sequence in demand.sequences for piece in sequence]
    encoded = iter(encode_pieces(tokenizer, pieces))
    return [
        tuple(_joined([(next(encoded), piece.learned) for piece in sequence]) for sequence in demand.sequences)
        for demand in demands
    ]


def encode_pieces(tokenizer: Tokenizer, pieces: Sequence[Piece]) -> list[NDArray[np.int32]]:
    """Return the ids of each piece, [tokens] int32.

    Raises: TokenizerError: if a completion is to end and the vocabulary has no end-of-document token.
    """
    if any(piece.ends for piece in pieces) and tokenizer.eod_id is None:
        raise TokenizerError(Problem("the tokenizer", "has no end-of-document token, which ends a completion"))
    plain = tokenizer.encode_batch([piece.text for piece in pieces], allowed_special="all")
    opening = tokenizer.encode("", add_special_tokens=True)
    before = np.array([id for id in opening if id != tokenizer.eod_id], np.int32)
    after = np.array([] if tokenizer.eod_id is None else [tokenizer.eod_id], np.int32)
    return [
        np.concatenate([before, ids][not piece.begins :] + [after][not piece.ends :])
        for piece, ids in zip(pieces, plain)
    ]


def _joined(parts: Sequence[tuple[NDArray[np.int32], bool]]) -> TokenSequence:
    ids = np.concatenate([ids for ids, _ in parts])
    learned = np.concatenate([np.full(len(ids), learned) for ids, learned in parts])
    learned[0] = False  # nothing stands before it that it could be predicted from
    return TokenSequence(ids, learned)


def truncated(sequence: TokenSequence, longest: int, policy: str) -> TokenSequence:
    """Return at most `longest` tokens of a sequence: its start or its end.

    Raises: TooLong: where it is longer, and the policy is neither.
    """
    if len(sequence.ids) <= longest:
        return sequence
    if policy == "keep_start":
        return TokenSequence(sequence.ids[:longest], sequence.learned[:longest])
    if policy == "keep_end":
        learned = sequence.learned[-longest:].copy()
        learned[0] = False
        return TokenSequence(sequence.ids[-longest:], learned)
    rule = f"are more than {longest:,}, as chat.truncation = {policy} takes them"
    raise TooLong(Problem(f"{len(sequence.ids):,} tokens", rule, "raise data.seq_length, or truncate"))
