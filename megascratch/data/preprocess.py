"""Preprocessing: a corpus of texts to indexed datasets of token ids, one dataset for each JSON key.

    {"text": "a b"}                              text:  [5 6 0] [7 0]
    {"text": "c", "lang": "en"}      →           with --append-eod, and eod 0
    {"text": "d"  ← bad line 3: not JSON

The corpus is cut into parts that depend on its files alone. Workers (processes here, or a Ray cluster's) each turn one
part at a time into files of tokens beside the output; the parent appends these in order. So the result is the same
bytes for every number of workers and every engine, a worker that dies costs its part once more, and an interrupted run
resumes behind its last finished part. The parts need as much room on the disk as the result, until it stands.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import xxhash
from rich.console import Console

from megascratch.data.checks import check_all
from megascratch.data.corpus import Limits, format_of, input_files
from megascratch.data.encode_part import encode_part
from megascratch.data.indexed import token_dtype
from megascratch.data.parts import Part, PartRecord, PartsDirectory, open_parts, parts_of
from megascratch.data.ray_engine import in_order_on_ray, require_ray
from megascratch.data.workers import Apply, in_order
from megascratch.data.writer import IndexedDatasetWriter, require_free
from megascratch.errors import DataError, Problem
from megascratch.log import progress
from megascratch.tokenizer import Tokenizer, Vocabulary

Engine = Literal["local", "ray"]

_SHOWN_BAD_LINES = 20
_DEFAULT_LIMITS = Limits()


@dataclass(frozen=True)
class BadLine:
    """A line (or row) that holds no document: where it is, and why."""

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
    def tokens_per_s(self) -> float:
        """Tokens written a second, of all keys."""
        return sum(self.n_tokens.values()) / self.seconds

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
    engine: Engine = "local",
    on_error: Literal["fatal", "skip"] = "fatal",
    resume: bool = False,
    overwrite: bool = False,
    limits: Limits = _DEFAULT_LIMITS,
    console: Console,
) -> Summary:
    """Tokenize a corpus into `<output_prefix>_<key>_document.{bin,idx}`.

    Args:
        inputs: files and patterns: one JSON object a line (blank lines are passed over), `.txt` (each one document),
            or `.parquet`; the first two also `.gz` or `.zst`.
        tokenizer: its vocabulary size decides between uint16 and int32; text that looks like a special token is text.
        output_prefix: where the datasets go; `<output_prefix>.parts` holds finished parts meanwhile.
        json_keys: whose strings are tokenized, columns of Parquet; a line that lacks one is bad for all.
        append_eod: end each document that has tokens with the end-of-document token.
        workers: tokenizing processes; with the local engine, 1 tokenizes in this one.
        engine: where the workers run: on this machine, or on the Ray cluster that this one belongs to, all of whose
            machines see the same files.
        on_error: what a bad line does: stop, or be left out and counted.
        resume: take up the finished parts of an interrupted run.
        overwrite: replace datasets that exist.
        limits: what is refused before it exhausts the machine.
        console: where progress is drawn.

    Raises:
        DataError: before work starts, for unreadable inputs, taken outputs and impossible options; then for a bad
            line if `on_error` is "fatal", for damaged compressed data, and if no document is left. No dataset is
            written then; finished parts stay for `resume`.
        MegascratchError: if a part's worker died three times.
    """
    started = time.perf_counter()
    prefixes = {key: Path(f"{output_prefix}_{key}_document") for key in json_keys}
    files: list[Path] = []
    checks: list[Callable[[], object]] = [
        lambda: files.extend(input_files(inputs)),
        lambda: _require_options(json_keys, append_eod, tokenizer, workers, engine),
        lambda: _require_keyed(files, json_keys),
        *(partial(require_free, prefix, overwrite) for prefix in prefixes.values()),
    ]
    check_all(checks, "the input and the options")

    dtype = token_dtype(tokenizer.vocab_size)
    eod_id = tokenizer.eod_id if append_eod else None
    plan = _plan(files, tokenizer, json_keys, append_eod)
    parts_path = Path(f"{output_prefix}.parts")
    tally = _Tally(on_error, json_keys)
    with (
        open_parts(parts_path, json_keys, plan, resume=resume, overwrite=overwrite) as directory,
        _engine(engine, partial(encode_part, tokenizer, directory, eod_id, dtype, limits), workers) as apply,
        _writers(prefixes, dtype, overwrite, directory.path) as writers,
        progress(console, "tokenize", sum(file.stat().st_size for file in files), "B") as advance,
    ):
        for part, record in _records(parts_of(files, json_keys, limits), directory, apply):
            tally.add(record)
            for key, writer in writers.items():
                writer.add_files(*directory.files(part.number, key))
            advance(part.file_bytes, tally.rates(time.perf_counter() - started))
        tally.require_documents(files)
    return tally.summary(prefixes, time.perf_counter() - started)


@contextmanager
def _writers(
    prefixes: Mapping[str, Path], dtype: np.dtype, overwrite: bool, scratch: Path
) -> Iterator[dict[str, IndexedDatasetWriter]]:
    """Open the dataset of each key; all appear when the body is done without an error."""
    with ExitStack() as stack:
        yield {
            key: stack.enter_context(IndexedDatasetWriter(prefix, dtype, overwrite=overwrite, scratch=scratch))
            for key, prefix in prefixes.items()
        }


def _engine(
    engine: Engine, encode: Callable[[Part], PartRecord], workers: int
) -> AbstractContextManager[Apply[Part, PartRecord]]:
    return in_order_on_ray(encode, workers) if engine == "ray" else in_order(encode, workers)


def _records(
    parts: Iterator[Part], directory: PartsDirectory, apply: Apply[Part, PartRecord]
) -> Iterator[tuple[Part, PartRecord]]:
    """Yield every part with its record, in order; finished ones are not made again."""
    unfinished: Part | None = None
    for part in parts:
        record = directory.finished(part.number)
        if record is None:
            unfinished = part
            break
        yield part, record
    if unfinished is None:
        return

    def rest() -> Iterator[Part]:
        yield unfinished
        yield from parts

    yield from apply(rest())


def _plan(files: Sequence[Path], tokenizer: Tokenizer, json_keys: Sequence[str], append_eod: bool) -> dict[str, object]:
    """Describe all that the parts depend on."""
    stats = [(file, file.stat()) for file in files]
    return {
        "format": 2,
        "input files": [[str(file), stat.st_size, stat.st_mtime_ns] for file, stat in stats],
        "tokenizer": _digest(tokenizer.vocabulary),
        "json keys": list(json_keys),
        "append_eod": append_eod,
    }


def _digest(vocabulary: Vocabulary) -> str:
    digest = xxhash.xxh3_128()
    for field in fields(vocabulary):
        value = getattr(vocabulary, field.name)
        digest.update(field.name.encode())
        digest.update(value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode())
    return digest.hexdigest()


def _require_options(
    json_keys: Sequence[str], append_eod: bool, tokenizer: Tokenizer, workers: int, engine: Engine
) -> None:
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
    if engine == "ray":
        require_ray()


def _require_keyed(files: Sequence[Path], json_keys: Sequence[str]) -> None:
    plain = [file for file in files if format_of(file) == "text"]
    if plain and len(json_keys) > 1:
        rule = "plain text is one string, and has no keys"
        problem = Problem(f"{len(json_keys)} json keys for {plain[0]}", rule, "preprocess plain text by itself")
        raise DataError(problem, "the options of preprocess")


class _Tally:
    """Counts over all parts, in order; stops at the first bad line when those are fatal."""

    def __init__(self, on_error: Literal["fatal", "skip"], json_keys: Sequence[str]) -> None:
        self.on_error = on_error
        self.n_documents = self.n_text_bytes = 0
        self.n_tokens = [0] * len(json_keys)
        self.n_lines: Counter[Path] = Counter()
        self.n_bad_lines: Counter[Path] = Counter()
        self.bad_lines: list[BadLine] = []

    def add(self, record: PartRecord) -> None:
        """Count a part.

        Raises: DataError: for its first bad line, if those are fatal.
        """
        for piece in record.files:
            file = Path(piece.file)
            bad_lines = [BadLine(file, self.n_lines[file] + 1 + n, reason) for n, reason in piece.bad_lines]
            if bad_lines and self.on_error == "fatal":
                bad = bad_lines[0]
                remedy = "correct the line, or add --on-error skip --resume to go on without bad lines"
                raise DataError(Problem(f"line {bad.line}", bad.reason, remedy), str(bad.file))
            self.n_lines[file] += piece.n_lines
            self.n_bad_lines[file] += piece.n_bad_lines
            self.bad_lines += bad_lines[: _SHOWN_BAD_LINES - len(self.bad_lines)]
        self.n_documents += record.n_documents
        self.n_text_bytes += record.n_text_bytes
        self.n_tokens = [sum(both) for both in zip(self.n_tokens, record.n_tokens)]

    def rates(self, seconds: float) -> str:
        """Return documents and tokens a second, for the line of progress."""
        return f"{self.n_documents / seconds:,.0f} documents/s · {sum(self.n_tokens) / seconds:,.0f} tokens/s"

    def summary(self, prefixes: dict[str, Path], seconds: float) -> Summary:
        """Return all counts."""
        n_tokens = dict(zip(prefixes, self.n_tokens))
        n_bad_lines = dict(+self.n_bad_lines)
        return Summary(prefixes, self.n_documents, n_tokens, self.n_text_bytes, n_bad_lines, self.bad_lines, seconds)

    def require_documents(self, files: Sequence[Path]) -> None:
        """Refuse a corpus without a document."""
        if self.n_documents:
            return
        rule = f"no document in {len(files)} files, {sum(self.n_bad_lines.values())} bad lines"
        shown = [Problem(str(bad), "left out") for bad in self.bad_lines[:3]]
        raise DataError([Problem("the corpus", rule, "nothing was written"), *shown], "the input")
