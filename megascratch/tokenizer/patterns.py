r"""Pre-tokenisation: cut text into pieces that no token may cross.

    gpt2     "don't pay 12345 ␣␣now"  →  don  't  ␣pay  ␣12345  ␣␣  ␣now
    cl100k                            →  don  't  ␣pay  ␣  123  45  ␣␣  ␣now

A piece list is handed over in bulk: the UTF-8 bytes of the text and the byte offset at which each piece ends. Whoever
encodes or counts reads those two and never sees a Python string per piece.
"""

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from operator import methodcaller
from types import MappingProxyType

import numpy as np
import regex
from numpy.typing import NDArray

from megascratch.errors import Problem, TokenizerError

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_CL100K = _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"  # letters that may stand in the capitalised part of a word, with marks
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

PATTERNS: Mapping[str, str] = MappingProxyType(
    {
        "gpt2": _GPT2,  # Radford et al. 2019
        "cl100k": _CL100K,  # GPT-4
        "o200k": _O200K,  # GPT-4o: case-aware words, contractions kept with them
        "llama3": _CL100K,  # Llama 3 took over GPT-4's
    }
)


def pattern_named(name: str) -> str:
    """Return the regular expression of a named pattern. Raises: TokenizerError: for a name that is not there."""
    if name in PATTERNS:
        return PATTERNS[name]
    close = difflib.get_close_matches(name, PATTERNS, n=1)
    remedy = f"did you mean {close[0]}?" if close else ""
    raise TokenizerError(Problem(f"pattern = {name}", f"must be one of {', '.join(PATTERNS)}", remedy))


@dataclass(frozen=True, eq=False)  # arrays have no single equality
class Pieces:
    """Pre-tokens of one text: piece i is `utf8[ends[i-1]:ends[i]]`, and together they are all of it.

    Args:
        utf8: the text's bytes.
        ends: byte offset at which each piece ends, strictly increasing, int64 [pieces].
    """

    utf8: bytes
    ends: NDArray[np.int64]


class Splitter:
    """Cuts text by one regular expression; what it does not match between two matches is a piece too.

    Args:
        pattern: an expression in the syntax of the `regex` package, of which `tokenizers` and `tiktoken` patterns use a
            part that means the same in all three.

    Raises: TokenizerError: if the expression does not compile.
    """

    def __init__(self, pattern: str) -> None:
        try:
            self._compiled = regex.compile(pattern)
        except regex.error as error:
            raise TokenizerError(
                Problem(f"pattern {_shortened(pattern)}", f"is not a regular expression that we can read: {error}")
            ) from None
        self._matches_everything = pattern in PATTERNS.values()

    def split(self, text: str) -> Pieces:
        """Cut a text.

        A lone surrogate U+DC80 to U+DCFF stands for a byte that is not UTF-8 (Python's `surrogateescape`), and comes
        out as that byte; this is how arbitrary bytes are split.
        """
        utf8 = text.encode("utf-8", "surrogateescape")
        ends = self._character_ends(text)
        return Pieces(utf8, ends if len(utf8) == len(text) else _byte_ends(text, ends))

    def _character_ends(self, text: str) -> NDArray[np.int64]:
        matches = self._compiled.finditer(text, concurrent=False)  # giving up the GIL for each match costs a third
        if self._matches_everything:
            return np.fromiter(map(methodcaller("end"), matches), np.int64)
        spans = np.fromiter((offset for match in matches for offset in match.span()), np.int64)
        ends = np.unique(np.append(spans, len(text)))
        return ends[ends > 0]


def finder(contents: Collection[str]) -> regex.Pattern[str] | None:
    """Compile a pattern that captures the leftmost of some strings, the longest where several start; None for none."""
    if not contents:
        return None
    return regex.compile("(" + "|".join(map(regex.escape, sorted(contents, key=len, reverse=True))) + ")")


def well_formed(text: str) -> str:
    """Replace lone surrogates by U+FFFD: a JSON file may hold them, UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _byte_ends(text: str, ends: NDArray[np.int64]) -> NDArray[np.int64]:
    """Turn character offsets into byte offsets, [pieces] → [pieces]."""
    code_points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    sizes = np.ones(len(code_points), np.uint8)
    for first_longer in (0x80, 0x800, 0x10000):
        sizes += code_points >= first_longer
    sizes[(code_points >= 0xDC80) & (code_points <= 0xDCFF)] = 1
    starts = np.concatenate([[0], ends[:-1]])
    return np.add.reduceat(sizes, starts, dtype=np.int64).cumsum()


def _shortened(pattern: str, limit: int = 60) -> str:
    return pattern if len(pattern) <= limit else pattern[: limit - 3] + "..."
