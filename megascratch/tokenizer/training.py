"""Train a tokenizer: count pre-tokens over all the text, then learn merges from the counts.

Ids: the 256 bytes in the order of GPT-2's alphabet, the merged tokens in the order in which they were learnt, and the
special tokens last. So the ids of text do not move when a special token is added, and the ranks of tiktoken's format
are the ids.

Special tokens that stand in the text are cut out before counting: they separate, and teach no merges.
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
from rich.console import Console

from megascratch.errors import Problem, TokenizerError
from megascratch.log import make_console, progress
from megascratch.tokenizer import _bpe
from megascratch.tokenizer.alphabet import BYTE_OF_CHARACTER, BYTES_IN_ID_ORDER
from megascratch.tokenizer.batches import in_batches
from megascratch.tokenizer.corpus import check_readable, sample_evenly, texts_of
from megascratch.tokenizer.patterns import PATTERNS, pattern_named, well_formed
from megascratch.tokenizer.tokenizer import Tokenizer
from megascratch.tokenizer.vocabulary import END_OF_DOCUMENT, MAX_IDS, AddedToken, Vocabulary, usual_end_of_document

DEFAULT_PATTERN = "cl100k"
_BATCH_BYTES = 1 << 23


def train(
    paths: Sequence[str | os.PathLike[str]],
    vocab_size: int,
    pattern: str = DEFAULT_PATTERN,
    special_tokens: Sequence[str] = (END_OF_DOCUMENT,),
    *,
    json_key: str = "text",
    limit_bytes: int | None = None,
    console: Console | None = None,
) -> Tokenizer:
    """Train on files, which may be larger than memory: only distinct pre-tokens are kept.

    Args:
        paths: JSONL files (.jsonl, .json, .ndjson) or plain text files (any other name).
        vocab_size: ids in all: 256 bytes, merges, and special tokens.
        pattern: name of the pre-tokeniser's pattern.
        special_tokens: contents of the special tokens, in the order of their ids. One of the usual names ends a
            document, otherwise the first.
        json_key: the key that holds the text in a JSONL file.
        limit_bytes: train on about this much of the files, documents taken evenly from all of them.
        console: where to show progress.

    Returns: the tokenizer; `save` writes it.

    Raises: TokenizerError: if an option is wrong or a file unreadable, all found before any work; if a line of JSONL is
        malformed; or if there is too little text for the vocabulary.
    """
    files = [Path(path) for path in paths]
    problems = [] if files else [Problem("no input files", "are given", "name at least one file")]
    if limit_bytes is not None and limit_bytes < 1:
        problems.append(Problem(f"limit_bytes = {limit_bytes}", "must be at least 1", "leave it out to use all text"))
    _check(vocab_size, pattern, special_tokens, [*problems, *check_readable(files)])
    console = console or make_console()
    total_bytes = sum(file.stat().st_size for file in files)
    share = 1.0 if limit_bytes is None or limit_bytes >= total_bytes else limit_bytes / total_bytes
    with progress(console, "counting pre-tokens", total_bytes, "B") as advance:
        texts = chain.from_iterable(texts_of(file, json_key, advance, sampled=share < 1) for file in files)
        counter = _count(sample_evenly(texts, share), pattern, special_tokens)
    return _learn(counter, vocab_size, pattern, special_tokens, console)


def train_from_texts(
    texts: Iterable[str],
    vocab_size: int,
    pattern: str = DEFAULT_PATTERN,
    special_tokens: Sequence[str] = (END_OF_DOCUMENT,),
    *,
    console: Console | None = None,
) -> Tokenizer:
    """Train on texts, taken one at a time; arguments and errors are those of `train`."""
    _check(vocab_size, pattern, special_tokens, [])
    counter = _count((well_formed(text).encode() for text in texts), pattern, special_tokens)
    return _learn(counter, vocab_size, pattern, special_tokens, console or make_console())


def _check(vocab_size: int, pattern: str, special_tokens: Sequence[str], problems: Sequence[Problem]) -> None:
    """Raise for every option that is wrong, and for the problems found already."""
    found = list(problems)
    smallest = 256 + len(special_tokens)
    if not smallest <= vocab_size < MAX_IDS:
        rule = f"must be from 256 bytes + {len(special_tokens)} special tokens to {MAX_IDS - 1}"
        found.append(Problem(f"vocab_size = {vocab_size}", rule, f"use at least {smallest}; 32000 is usual"))
    try:
        pattern_named(pattern)
    except TokenizerError as error:
        found += error.problems
    for content, times in Counter(special_tokens).items():
        if times > 1:
            found.append(Problem(f"special token {content!r}", "is given twice"))
        if content != well_formed(content) or len(content.encode()) < 2:
            rule = "must be text that UTF-8 can write, longer than one byte"
            found.append(Problem(f"special token {content!r}", rule))
        elif not content.isascii() and all(character in BYTE_OF_CHARACTER for character in content):
            rule = "reads as plain bytes in the alphabet of tokenizer.json"
            found.append(Problem(f"special token {content!r}", rule, "write it in ASCII"))
    if found:
        raise TokenizerError(found, where="tokenizer training")


def _count(texts: Iterable[bytes], pattern: str, special_tokens: Sequence[str]) -> _bpe.PieceCounter:
    counter = _bpe.PieceCounter()
    threads = os.cpu_count() or 1
    special = [content.encode() for content in special_tokens]
    border = re.compile(b"|".join(map(re.escape, sorted(special, key=len, reverse=True))))
    for batch in in_batches(texts, _BATCH_BYTES):
        parts: list[bytes] = []
        for text in batch:
            # Searching for each token alone runs at memory speed; the expression does not, and is seldom needed.
            parts += border.split(text) if any(content in text for content in special) else [text]
        ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
        counter.add(pattern, parts[0] if len(parts) == 1 else b"".join(parts), ends, threads)
    if counter.n_distinct == 0:
        raise TokenizerError(
            Problem("the input", "holds no text", "is the JSON key right, and are the files not empty?")
        )
    return counter


def _learn(
    counter: _bpe.PieceCounter, vocab_size: int, pattern: str, special_tokens: Sequence[str], console: Console
) -> Tokenizer:
    n_tokens = vocab_size - len(special_tokens)
    with progress(console, "learning merges", n_tokens - 256, "merges") as advance:
        tokens, merges = counter.train(BYTES_IN_ID_ORDER, n_tokens, _increments(advance))
    if len(tokens) < n_tokens:
        reached = len(tokens) + len(special_tokens)
        rule = f"is out of reach: the text yields only {len(merges):,} merges"
        remedy = f"use vocab_size ≤ {reached}, or give more text"
        raise TokenizerError(Problem(f"vocab_size = {vocab_size}", rule, remedy), where="tokenizer training")
    added = tuple(AddedToken(n_tokens + n, content) for n, content in enumerate(special_tokens))
    ranks = np.arange(len(merges), dtype=np.int32)
    return Tokenizer(
        Vocabulary(
            tokens=[*tokens, *(b"" for _ in added)],
            merges=np.column_stack([merges, ranks]),
            added=added,
            pattern=PATTERNS[pattern],
            end_of_document=usual_end_of_document(added) or next(iter(special_tokens), None),
        )
    )


def _increments(advance: Callable[[float], None]) -> Callable[[int], None]:
    """Turn a count of tokens so far into steps of a progress bar."""
    before = 256

    def report(n_tokens: int) -> None:
        nonlocal before
        advance(n_tokens - before)
        before = n_tokens

    return report
