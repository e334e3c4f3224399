"""Training text from files, in pieces that fit in memory.

JSONL gives one text a line. A plain file is one text; a large one is cut where no pattern can tell: between a letter or
digit and the line feed after it, since no piece holds both.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from megascratch.errors import Problem, TokenizerError
from megascratch.tokenizer.patterns import well_formed

_JSONL_SUFFIXES = (".jsonl", ".json", ".ndjson")
_CHUNK_BYTES = 1 << 24
_SAMPLED_CHUNK_BYTES = 1 << 14
_SAFE_BORDER = re.compile(rb"(?s:.*)[0-9A-Za-z](?=\n)")


def check_readable(paths: Sequence[Path]) -> list[Problem]:
    """Return a problem for each path that is not a file we can read."""
    problems = []
    for path in paths:
        if path.is_dir():
            problems.append(Problem(str(path), "is a directory", "give the files in it"))
            continue
        try:
            path.open("rb").close()
        except OSError as error:
            problems.append(Problem(str(path), f"cannot be read: {error.strerror}", "correct the path"))
    return problems


def texts_of(path: Path, json_key: str, advance: Callable[[float], None], *, sampled: bool = False) -> Iterator[bytes]:
    """Yield the texts of one file.

    Args:
        json_key: the key that holds the text, in a file named .jsonl, .json or .ndjson.
        advance: told the bytes read.
        sampled: not all texts will be used, so yield a plain file in smaller ones.

    Yields: UTF-8 text; a plain file's bytes are as they are.

    Raises: TokenizerError: for a line that is not a JSON object with that key.
    """
    is_jsonl = path.suffix.lower() in _JSONL_SUFFIXES
    chunk_bytes = _SAMPLED_CHUNK_BYTES if sampled else _CHUNK_BYTES
    read = _jsonl_texts(path, json_key) if is_jsonl else plain_texts(path, chunk_bytes)
    for text, n_bytes in read:
        yield text
        advance(n_bytes)


def sample_evenly(texts: Iterable[bytes], share: float) -> Iterator[bytes]:
    """Yield about this share of the texts' bytes, in whole texts from beginning to end.

    Each text adds its part to a debt, and is taken when the debt covers it: no text is more likely for its place, and
    the same texts are taken every time.
    """
    if share >= 1:
        yield from texts
        return
    owed = 0.0
    for text in texts:
        owed += share * len(text)
        if owed >= len(text):
            owed -= len(text)
            yield text


def _jsonl_texts(path: Path, json_key: str) -> Iterator[tuple[bytes, int]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)[json_key]
            except (ValueError, RecursionError) as error:
                raise _bad_line(path, number, f"is not JSON: {error}") from None
            except (KeyError, TypeError, IndexError):
                raise _bad_line(path, number, f"must be an object with the key {json_key!r}") from None
            if not isinstance(text, str):
                raise _bad_line(path, number, f"must hold a string under {json_key!r}")
            yield well_formed(text).encode(), len(line)


def _bad_line(path: Path, number: int, rule: str) -> TokenizerError:
    return TokenizerError(Problem(f"{path}, line {number}", rule, "correct the line, or name another key"))


def plain_texts(path: Path, chunk_bytes: int) -> Iterator[tuple[bytes, int]]:
    """Yield a plain file in chunks of about `chunk_bytes`, and the bytes that each took."""
    rest = b""
    with path.open("rb") as file:
        while block := file.read(chunk_bytes):
            block = rest + block
            border = _SAFE_BORDER.match(block)
            # A chunk with no such line end is not prose; then a cut anywhere costs at most one odd piece a chunk.
            cut = border.end() if border else len(block)
            yield block[:cut], cut
            rest = block[cut:]
    if rest:
        yield rest, len(rest)
