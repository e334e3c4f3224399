"""Preprocessing: JSON Lines to indexed datasets of token ids, one dataset for each JSON key.

    {"text": "a b"}                              text:  [5 6 0] [7 0]
    {"text": "c", "lang": "en"}      →           with --append-eod, and eod 0
    {"text": "d"  ← bad line 3: not JSON

The parent reads blocks of lines and writes; workers parse and tokenize. Blocks are handed out as workers fall idle
and written in the order of the input, so that the files are the same bytes whatever the number of workers.
"""

import json
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from megascratch.data.checks import check_all
from megascratch.data.corpus import Block, read_blocks, require_readable
from megascratch.data.indexed import token_dtype
from megascratch.data.workers import in_order
from megascratch.data.writer import IndexedDatasetWriter, require_free
from megascratch.errors import DataError, Problem
from megascratch.log import progress
from megascratch.tokenizer import Tokenizer

_BLOCK_BYTES = 256 << 10
_SHOWN_BAD_LINES = 20


@dataclass(frozen=True)
class BadLine:
    """A line that holds no document: where it is, and why."""

    file: Path
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


@dataclass(frozen=True)
class Summary:
    """What preprocessing did.

    Attributes:
        prefixes: of the datasets written, one for each key.
        n_documents: lines that became documents.
        n_tokens: in each dataset, by key, end-of-document tokens included.
        n_text_bytes: decompressed bytes read.
        n_bad_lines: lines left out, by input file.
        bad_lines: the first of them.
        seconds: wall time.
    """

    prefixes: dict[str, Path]
    n_documents: int
    n_tokens: dict[str, int]
    n_text_bytes: int
    n_bad_lines: dict[Path, int]
    bad_lines: list[BadLine]
    seconds: float

    @property
    def documents_per_s(self) -> float:
        """Documents written a second."""
        return self.n_documents / self.seconds

    @property
    def text_bytes_per_s(self) -> float:
        """Decompressed bytes read a second."""
        return self.n_text_bytes / self.seconds


def preprocess(
    inputs: Sequence[Path | str],
    tokenizer: Tokenizer,
    output_prefix: Path | str,
    *,
    json_keys: Sequence[str] = ("text",),
    append_eod: bool = False,
    workers: int = 1,
    on_error: Literal["fatal", "skip"] = "fatal",
    overwrite: bool = False,
    console: Console,
) -> Summary:
    """Tokenize JSON Lines into `<output_prefix>_<key>_document.{bin,idx}`.

    Args:
        inputs: files of one JSON object a line, plain, `.gz` or `.zst`; blank lines are passed over.
        tokenizer: its vocabulary size decides between uint16 and int32; text that looks like a special token is text.
        output_prefix: where the datasets go.
        json_keys: whose strings are tokenized; a line that lacks one is bad for all.
        append_eod: end each document that has tokens with the end-of-document token.
        workers: tokenizing processes; 1 tokenizes in this one.
        on_error: what a bad line does: stop, with nothing written, or be left out and counted.
        overwrite: replace datasets that exist.
        console: where progress is drawn.

    Raises: DataError: before work starts, for unreadable inputs, taken outputs and impossible options; then for a bad
        line if `on_error` is "fatal", for damaged compressed data, and if no document is left. Nothing is written then.
    """
    files = [Path(file) for file in inputs]
    prefixes = {key: Path(f"{output_prefix}_{key}_document") for key in json_keys}
    checks = [
        partial(require_readable, files),
        partial(_require_options, json_keys, append_eod, tokenizer, workers),
        *(partial(require_free, prefix, overwrite) for prefix in prefixes.values()),
    ]
    check_all(checks, "the input and the options")

    dtype = token_dtype(tokenizer.vocab_size)
    eod_id = tokenizer.eod_id if append_eod else None
    encode = partial(_encode_block, tokenizer=tokenizer, json_keys=tuple(json_keys), eod_id=eod_id, dtype=dtype)
    tally = _Tally(on_error)
    started = time.perf_counter()
    with ExitStack() as stack:
        encode_in_order = stack.enter_context(in_order(encode, workers))  # forks before any thread starts
        writers = [
            stack.enter_context(IndexedDatasetWriter(prefix, dtype, overwrite=overwrite))
            for prefix in prefixes.values()
        ]
        file_bytes = sum(file.stat().st_size for file in files)
        advance = stack.enter_context(progress(console, "tokenize", file_bytes, "B"))
        blocks = (block for file in files for block in read_blocks(file, _BLOCK_BYTES))
        for block, encoded in encode_in_order(blocks):
            tally.add(block, encoded)
            for writer, documents in zip(writers, encoded.by_key):
                writer.add_documents(documents.tokens, documents.lengths)
            advance(block.file_bytes)
        tally.require_documents(files)
    seconds = time.perf_counter() - started
    n_tokens = dict(zip(json_keys, tally.n_tokens))
    return Summary(
        prefixes, tally.n_documents, n_tokens, tally.n_text_bytes, dict(+tally.n_bad_lines), tally.bad_lines, seconds
    )


def _require_options(json_keys: Sequence[str], append_eod: bool, tokenizer: Tokenizer, workers: int) -> None:
    problems = []
    for key, count in Counter(json_keys).items():
        if count > 1:
            problems.append(Problem(f"json key {key}", f"is given {count} times", "give each key once"))
        if "/" in key or not key:
            problems.append(Problem(f"json key {key!r}", "becomes part of a file name", "rename it in the corpus"))
    if not json_keys:
        problems.append(Problem("no json key", "at least one is needed", "give the key of the text, usually text"))
    if append_eod and tokenizer.eod_id is None:
        remedy = "train the tokenizer with one, or leave --append-eod out"
        problems.append(Problem("--append-eod", "the tokenizer has no end-of-document token", remedy))
    if workers < 1:
        problems.append(Problem(f"workers = {workers}", "must be at least 1", "use the number of cores"))
    if problems:
        raise DataError(problems, "the options of preprocess")


@dataclass(frozen=True)
class _Documents:
    """Documents of one key: their tokens one after the other, [sum of lengths], and lengths, [n_documents] int64."""

    tokens: NDArray
    lengths: NDArray[np.int64]


@dataclass(frozen=True)
class _EncodedBlock:
    by_key: list[_Documents]
    n_documents: int
    bad_lines: list[BadLine]


class _Tally:
    """Counts over all blocks, in input order; stops at the first bad line when those are fatal."""

    def __init__(self, on_error: Literal["fatal", "skip"]) -> None:
        self.on_error = on_error
        self.n_documents = self.n_text_bytes = 0
        self.n_tokens: list[int] = []
        self.n_bad_lines: Counter[Path] = Counter()
        self.bad_lines: list[BadLine] = []

    def add(self, block: Block, encoded: _EncodedBlock) -> None:
        if encoded.bad_lines and self.on_error == "fatal":
            bad = encoded.bad_lines[0]
            remedy = "correct the line, or leave bad lines out with on_error = skip; nothing was written"
            raise DataError(Problem(f"line {bad.line}", bad.reason, remedy), str(bad.file))
        self.n_documents += encoded.n_documents
        self.n_text_bytes += len(block.data)
        counts = [len(documents.tokens) for documents in encoded.by_key]
        self.n_tokens = [sum(both) for both in zip(self.n_tokens or [0] * len(counts), counts)]
        self.n_bad_lines[block.file] += len(encoded.bad_lines)
        self.bad_lines += encoded.bad_lines[: _SHOWN_BAD_LINES - len(self.bad_lines)]

    def require_documents(self, files: Sequence[Path]) -> None:
        if self.n_documents:
            return
        rule = f"no document in {len(files)} files, {sum(self.n_bad_lines.values())} bad lines"
        shown = [Problem(str(bad), "left out") for bad in self.bad_lines[:3]]
        raise DataError([Problem("the corpus", rule, "nothing was written"), *shown], "the input")


def _encode_block(
    block: Block, *, tokenizer: Tokenizer, json_keys: tuple[str, ...], eod_id: int | None, dtype: np.dtype
) -> _EncodedBlock:
    texts: list[list[str]] = [[] for _ in json_keys]
    bad_lines = []
    for number, line in enumerate(block.data.split(b"\n"), block.first_line):
        if not line.strip():
            continue
        try:
            values = _parse_line(line, json_keys)
        except ValueError as error:
            bad_lines.append(BadLine(block.file, number, str(error)))
            continue
        for values_of_key, value in zip(texts, values):
            values_of_key.append(value)
    by_key = [_encode_texts(tokenizer, values_of_key, eod_id, dtype) for values_of_key in texts]
    return _EncodedBlock(by_key, len(texts[0]), bad_lines)


def _parse_line(line: bytes, json_keys: tuple[str, ...]) -> list[str]:
    """Return the string of each key; raise ValueError, saying what is wrong, for anything else."""
    try:
        parsed = json.loads(line.decode("utf-8-sig"))  # -sig: some editors begin a file with a byte-order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise ValueError(f"not a JSON object: {type(parsed).__name__}")
    values = []
    for key in json_keys:
        if key not in parsed:
            raise ValueError(f'no key "{key}"')
        if not isinstance(parsed[key], str):
            raise ValueError(f'"{key}" is not a string: {type(parsed[key]).__name__}')
        values.append(parsed[key])
    return values


def _encode_texts(tokenizer: Tokenizer, texts: list[str], eod_id: int | None, dtype: np.dtype) -> _Documents:
    documents = [np.asarray(ids) for ids in tokenizer.encode_batch(texts, threads=1)] if texts else []
    if eod_id is not None:
        # An empty document gets no end, as in Megatron: it has no sequence at all.
        documents = [np.append(ids, eod_id) if len(ids) else ids for ids in documents]
    lengths = np.array([len(ids) for ids in documents], np.int64)
    filled = [ids for ids in documents if len(ids)]
    tokens = np.concatenate(filled) if filled else np.empty(0, dtype)
    assert int(tokens.max(initial=0)) < tokenizer.vocab_size, "the tokenizer gave an id outside its vocabulary"
    tokens = tokens.astype(dtype)
    return _Documents(tokens, lengths)
