"""Find the added tokens of a text, and normalise what lies between them.

added   <mask> (lstrip)   "\\n\\n" (normalized)
"See <mask>.\\r\\n\\r\\n"
  tokens of the raw text first, with the space that they swallow     "See"  <mask>  ".\\r\\n\\r\\n"
  the rest is normalised, say \\r\\n → \\n                               "See"  <mask>  ".\\n\\n"
  then the tokens of normalised text                                 "See"  <mask>  "."  "\\n\\n"
"""

from collections.abc import Callable, Collection, Iterable, Iterator

import regex

from megascratch.tokenizer.patterns import finder
from megascratch.tokenizer.vocabulary import AddedToken

_SPACE = regex.compile(r"\s*")
_WORD = regex.compile(r"\w")


class AddedTokenFinder:
    """Cuts texts at some of the added tokens of a vocabulary.

    Args:
        added: the tokens to recognise.
        normalize: what is done to the text between those found in raw text.
    """

    def __init__(self, added: Collection[AddedToken], normalize: Callable[[str], str]) -> None:
        self._normalize = normalize
        self._raw = {token.content: token for token in added if not token.normalized}
        self._normalized = {normalize(token.content): token for token in added if token.normalized}
        self._raw_border, self._normalized_border = finder(self._raw), finder(self._normalized)

    def find(self, text: str) -> list[str | AddedToken]:
        """Return the text in order: added tokens, and normalised stretches without any, none of them empty."""
        parts: list[str | AddedToken] = []
        for part in _cut(text, self._raw_border, self._raw):
            if isinstance(part, AddedToken):
                parts.append(part)
            else:
                parts += _cut(self._normalize(part), self._normalized_border, self._normalized)
        return parts


def _cut(text: str, border: regex.Pattern[str] | None, tokens: dict[str, AddedToken]) -> Iterable[str | AddedToken]:
    if border is None:
        return [text] if text else []
    if any(token.lstrip or token.rstrip or token.single_word for token in tokens.values()):
        return _cut_by_flags(text, border, tokens)
    # text, token, text, token, ..., text
    parts = enumerate(border.split(text))
    return [tokens[part] if n % 2 == 1 else part for n, part in parts if part]


def _cut_by_flags(text: str, border: regex.Pattern[str], tokens: dict[str, AddedToken]) -> Iterator[str | AddedToken]:
    at = 0
    for match in border.finditer(text):
        start, stop = match.span()
        token = tokens[match[0]]
        in_word = _WORD.match(text, start - 1, start) if start else None
        if token.single_word and (in_word or _WORD.match(text, stop)):
            continue
        if token.lstrip:
            while start > at and _SPACE.match(text, start - 1, start).end() == start:
                start -= 1
        if token.rstrip:
            stop = _SPACE.match(text, stop).end()
        if at < start:
            yield text[at:start]
        yield token
        at = stop
    if at < len(text):
        yield text[at:]
