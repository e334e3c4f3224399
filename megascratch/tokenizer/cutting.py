r"""The steps before merging: text is normalised, and cut several times in a row.

Most tokenizers cut once, by one pattern (`patterns.Splitter`). Others cut what has been cut again, each time seeing one
piece as if it were the whole text:

    DeepSeek-V3    "第12345章"  ─ \p{N}{1,3} ─▶  第  123  45  章  ─ [一-龥]+ ─▶  the same  ─ words ─▶  the same
    Falcon         the last cuts are made after the text has been written in the byte alphabet

The order is: `normalise`, `cuts`, a space in front where the vocabulary says so, `pattern`, `byte_cuts`.
"""

import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import regex

from megascratch.errors import Problem, TokenizerError
from megascratch.tokenizer.alphabet import to_bytes, to_characters
from megascratch.tokenizer.patterns import Pieces, Splitter

SPACE = "▁"  # U+2581, which SentencePiece writes for a space
WHOLE = r"(?s:.+)"  # the pattern that cuts nothing

Behavior = Literal["Removed", "Isolated", "Contiguous", "MergedWithPrevious", "MergedWithNext"]
Prefix = Literal["always", "first", "never"]
UnicodeForm = Literal["NFC", "NFD", "NFKC", "NFKD"]

_WORD = r"\p{Alphabetic}\p{M}\p{Nd}\p{Pc}²³¹¼½¾"  # Oniguruma's \w
_SAME_CLASSES = ("[:alpha:]", "[:lower:]", "[:upper:]", "[:space:]", "[:xdigit:]")


@dataclass(frozen=True)
class Cut:
    """Cut at the matches of a pattern.

    Args:
        pattern: in the syntax of Oniguruma, which Hugging Face's format is written in.
        behavior: what becomes of a match: a piece of its own (Isolated), one piece with the matches that touch it
            (Contiguous), a part of the piece before or after it, or nothing (Removed).
        invert: what lies between the matches counts as the match, and the other way round.
    """

    pattern: str
    behavior: Behavior = "Isolated"
    invert: bool = False

    def __post_init__(self) -> None:
        if self.behavior not in get_args(Behavior):
            rule = f"must be one of {', '.join(get_args(Behavior))}"
            raise TokenizerError(Problem(f"Split of behavior {self.behavior}", rule))


@dataclass(frozen=True)
class Replace:
    """Put `content` for every match of `pattern`: a literal text, or an expression in the syntax of Oniguruma."""

    pattern: str
    content: str
    is_expression: bool = False


@dataclass(frozen=True)
class Prepend:
    """Put `content` in front of a text that is not empty."""

    content: str


Normalization = UnicodeForm | Replace | Prepend


@dataclass(frozen=True)
class Spaces:
    """How a space is written as ▁ after normalising (Hugging Face's Metaspace).

    Args:
        prefix: in front of which stretches of text a missing ▁ is added; "first" is the one that a text begins with.
        cut: each ▁ begins a new piece.
    """

    prefix: Prefix
    cut: bool

    def __post_init__(self) -> None:
        if self.prefix not in get_args(Prefix):
            raise TokenizerError(
                Problem(f"prepend_scheme = {self.prefix}", f"must be one of {', '.join(get_args(Prefix))}")
            )


def normalizer(steps: Sequence[Normalization]) -> Callable[[str], str]:
    """Return the function that does all the steps. Raises: TokenizerError: if an expression cannot be read."""
    functions = [_normalization(step) for step in steps]

    def normalize(text: str) -> str:
        for function in functions:
            text = function(text)
        return text

    return normalize


def _normalization(step: Normalization) -> Callable[[str], str]:
    match step:
        case Prepend(content):
            return lambda text: content + text if text else text
        case Replace(pattern, content, is_expression=False):
            return lambda text: text.replace(pattern, content)
        case Replace(pattern, content):
            compiled = _compile(pattern)
            return lambda text: compiled.sub(lambda _: content, text)
        case form:
            return lambda text: unicodedata.normalize(form, text)


class PreTokenizer:
    """Cuts text in several steps; `split` is that of `Splitter`.

    Args:
        prefix_space: each piece that `cuts` leaves, and that does not begin with a space, gets one.
        pattern: the cut before bytes are looked at.
        byte_cuts: cuts of the text as it is written in the byte alphabet.
    """

    def __init__(self, cuts: Sequence[Cut], prefix_space: bool, pattern: str, byte_cuts: Sequence[Cut]) -> None:
        self._cuts = [_cutter(cut) for cut in cuts]
        self._prefix_space = prefix_space
        self._splitter = Splitter(pattern)
        self._byte_cuts = [_cutter(cut) for cut in byte_cuts]

    def split(self, text: str) -> Pieces:
        """Cut a text; see `Splitter.split` on lone surrogates."""
        parts = _cut_again([text] if text else [], self._cuts)
        if self._prefix_space:
            parts = [part if part.startswith(" ") else " " + part for part in parts]
        pieces = [self._splitter.split(part) for part in parts]
        if not self._byte_cuts:
            offsets = np.cumsum([0, *(len(piece.utf8) for piece in pieces)])
            ends = [piece.ends + offset for piece, offset in zip(pieces, offsets)]
            return Pieces(b"".join(piece.utf8 for piece in pieces), np.concatenate([np.empty(0, np.int64), *ends]))
        in_alphabet = [to_characters(word) for piece in pieces for word in _words(piece)]
        words = _cut_again(in_alphabet, self._byte_cuts)
        return Pieces(to_bytes("".join(words)), np.cumsum([len(word) for word in words], dtype=np.int64))


class CharacterPreTokenizer:
    """Cuts text for merges over characters: nowhere, if nothing says so; `split` is that of `Splitter`."""

    def __init__(self, cuts: Sequence[Cut]) -> None:
        self._cuts = [_cutter(cut) for cut in cuts]

    def split(self, text: str) -> Pieces:
        """Cut a text; see `Splitter.split` on lone surrogates."""
        parts = [part.encode("utf-8", "surrogateescape") for part in _cut_again([text] if text else [], self._cuts)]
        return Pieces(b"".join(parts), np.cumsum([len(part) for part in parts], dtype=np.int64))


def with_spaces(text: str, spaces: Spaces, at_start: bool) -> str:
    """Write the spaces of a stretch as ▁.

    Args:
        at_start: it is what the whole text begins with.
    """
    text = text.replace(" ", SPACE)
    wanted = spaces.prefix == "always" or (spaces.prefix == "first" and at_start)
    return SPACE + text if wanted and text and not text.startswith(SPACE) else text


def as_we_read_it(pattern: str) -> str:
    r"""Translate an expression of Oniguruma into the syntax of the `regex` package; most mean the same in both.

    Raises: TokenizerError: for what has no counterpart here.

    The differences that tokenizers use: ^ and $ are about lines, \z is the end of the text and \Z may leave a line feed
    behind it, \h is a hexadecimal digit, a class may stand in a class, and \w does not hold the zero-width joiners, but
    the superscripts and fractions of Latin-1.
    """
    translated = ""
    depth, flags = 0, set()
    for token in regex.findall(r"\\p\{[^}]*\}|\\.|\[:\^?\w+:\]|\[\^?\]?|\(\?[a-zA-Z-]+[:)]|&&|.", pattern, regex.S):
        if token.startswith("["):
            if not token.startswith("[:"):
                depth += 1
                flags |= {"V1"} if depth > 1 else set()
        elif token == "]" and depth:
            depth -= 1
        elif token == "&&" and depth:
            flags.add("V1")
        elif token in "^$" and not depth:
            flags.add("m")
        translated += _counterpart(token, depth > 0)
    return "".join(f"(?{flag})" for flag in sorted(flags)) + translated


def _counterpart(token: str, in_class: bool) -> str:
    """Return what means the same here as one token of Oniguruma."""
    match token:
        case r"\h":
            return "0-9a-fA-F" if in_class else "[0-9a-fA-F]"
        case r"\w":
            return _WORD if in_class else f"[{_WORD}]"
        case r"\W" if not in_class:
            return f"[^{_WORD}]"
        case r"\z":
            return r"\Z"
        case r"\Z":
            return r"(?=\n?\Z)"
        case "[:digit:]":
            return r"\d"
        case r"\H" | r"\R" | r"\X" | r"\K" | r"\G" | r"\b" | r"\B" | r"\W":
            raise TokenizerError(Problem(f"{token} in a pattern", "is not supported"))
    if token.startswith("[:") and token not in _SAME_CLASSES:
        raise TokenizerError(Problem(f"{token} in a pattern", "is not supported"))
    if token.startswith("(?") and set(token[2:-1]) - {"i", "-"}:
        raise TokenizerError(Problem(f"{token} in a pattern", "is not supported", "only (?i) is"))
    return token


def _compile(pattern: str) -> regex.Pattern[str]:
    try:
        return regex.compile(as_we_read_it(pattern))
    except regex.error as error:
        raise TokenizerError(
            Problem(f"pattern {pattern[:60]}", f"is not a regular expression that we can read: {error}")
        ) from None


def _cutter(cut: Cut) -> Callable[[str], Iterator[str]]:
    compiled = _compile(cut.pattern)

    def cut_text(text: str) -> Iterator[str]:
        before = 0
        for start, stop, matched in _arranged(_stretches(compiled, text, cut.invert), cut.behavior):
            assert start >= before
            before = stop
            if start < stop and not (matched and cut.behavior == "Removed"):
                yield text[start:stop]

    return cut_text


def _cut_again(parts: list[str], cutters: Sequence[Callable[[str], Iterator[str]]]) -> list[str]:
    for cutter in cutters:
        parts = [smaller for part in parts for smaller in cutter(part)]
    return parts


def _stretches(compiled: regex.Pattern[str], text: str, invert: bool) -> Iterator[tuple[int, int, bool]]:
    """Yield the matches and what lies between them: start, stop, whether it counts as a match."""
    at = 0
    for match in compiled.finditer(text):
        if at < match.start():
            yield at, match.start(), invert
        yield *match.span(), not invert
        at = match.end()
    if at < len(text):
        yield at, len(text), invert


def _arranged(stretches: Iterator[tuple[int, int, bool]], behavior: Behavior) -> list[tuple[int, int, bool]]:
    """Join stretches as the behavior says."""
    if behavior in ("Removed", "Isolated"):
        return list(stretches)
    ordered = list(stretches)
    if behavior == "MergedWithNext":
        ordered.reverse()
    joined: list[tuple[int, int, bool]] = []
    previous = False
    for start, stop, matched in ordered:
        together = matched == previous if behavior == "Contiguous" else matched and not previous
        if together and joined:
            first, last, _ = joined[-1]
            joined[-1] = (min(first, start), max(last, stop), False)
        else:
            joined.append((start, stop, False))
        previous = matched
    return joined[::-1] if behavior == "MergedWithNext" else joined


def _words(pieces: Pieces) -> Iterator[bytes]:
    start = 0
    for end in pieces.ends.tolist():
        yield pieces.utf8[start:end]
        start = end
