r"""Pre-tokenisation: cut text into pieces that no token may cross.

    gpt2     "don't pay 12345 ␣␣now"  →  don  't  ␣pay  ␣12345  ␣␣  ␣now
    cl100k                            →  don  't  ␣pay  ␣  123  45  ␣␣  ␣now

The patterns named here have scanners in C++ (csrc/host/scanner.h); any other goes through the `regex` package, some
twenty times slower. A piece list is handed over in bulk: the UTF-8 bytes of the text and the byte offset at which each
piece ends. Whoever encodes or counts reads those two and never sees a Python string per piece.
"""

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import regex
from numpy.typing import NDArray

from megascratch.errors import Problem, TokenizerError
from megascratch.tokenizer import _bpe

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
# In tiktoken's cl100k, spaces at the end of the text are one piece, line ends or not: `\s++$`. Here that is written so
# that it means the same in `regex`, `tokenizers` and tiktoken.
_CL100K = rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1,3}}|{_SYMBOLS}|\s+(?![\s\S])|{_SPACES}"
_LLAMA3 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1,3}}|{_SYMBOLS}|{_SPACES}"
_QWEN2 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}|{_SYMBOLS}|{_SPACES}"

_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"  # letters that may stand in the capitalised part of a word, with marks
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)

# The name of a pattern is the name of its scanner.
PATTERNS: Mapping[str, str] = MappingProxyType(
    {
        "gpt2": _GPT2,  # Radford et al. 2019
        "cl100k": _CL100K,  # GPT-4
        "o200k": _O200K,  # GPT-4o: case-aware words, contractions kept with them
        "llama3": _LLAMA3,  # GPT-4's, but for spaces at the end of the text
        "qwen2": _QWEN2,  # Qwen 2, 2.5 and 3: digits one by one
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
        self.scanner = next((name for name, known in PATTERNS.items() if known == pattern), None)
        try:
            self._compiled = regex.compile(pattern)
        except regex.error as error:
            raise TokenizerError(
                Problem(f"pattern {_shortened(pattern)}", f"is not a regular expression that we can read: {error}")
            ) from None

    def split(self, text: str) -> Pieces:
        """Cut a text.

        A lone surrogate U+DC80 to U+DCFF stands for a byte that is not UTF-8 (Python's `surrogateescape`), and comes
        out as that byte; this is how arbitrary bytes are split.
        """
        utf8 = text.encode("utf-8", "surrogateescape")
        if self.scanner is not None:
            return Pieces(utf8, _bpe.scan(self.scanner, utf8))
        ends = self.match_ends(text)
        return Pieces(utf8, ends if len(utf8) == len(text) else _byte_ends(text, ends))

    def match_ends(self, text: str) -> NDArray[np.int64]:
        """Return the character offset at which each piece ends, as `regex` has it."""
        matches = self._compiled.finditer(text, concurrent=False)  # giving up the GIL for each match costs a third
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
    if text.isascii():
        return text
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
