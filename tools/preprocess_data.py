#!/usr/bin/env python3
"""Preprocess JSON Lines with the flags of Megatron-LM's tools/preprocess_data.py.

The same scripts run unchanged; a flag that changes nothing here is accepted and said, one that can't be honoured is
refused. The work is done by megascratch.data.preprocess.

    python tools/preprocess_data.py --input corpus.jsonl --output-prefix data/corpus --append-eod --workers 8 \\
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model tokenizer.json
"""

import argparse
import sys
from pathlib import Path

from megascratch.data.preprocess import preprocess
from megascratch.errors import DataError, Problem, TokenizerError, exit_code_of
from megascratch.log import make_console
from megascratch.tokenizer import Tokenizer, megatron_files

HERE = "the flags of preprocess_data.py"


def parse_flags(argv: list[str]) -> argparse.Namespace:
    """Return Megatron's flags, and the three that we add."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    source = parser.add_argument_group("input data")
    source.add_argument("--input", required=True, help="a file, or a pattern: JSON Lines, .txt, .parquet; .gz or .zst")
    source.add_argument("--json-keys", nargs="+", default=["text"], help="keys of the strings to tokenize")
    source.add_argument("--split-sentences", action="store_true", help="refused: documents are not split")
    source.add_argument("--keep-newlines", action="store_true", help="of --split-sentences")
    source.add_argument("--lang", help="of --split-sentences")

    tokenizer = parser.add_argument_group("tokenizer")
    tokenizer.add_argument("--tokenizer-type", help="HuggingFaceTokenizer or GPT2BPETokenizer")
    tokenizer.add_argument("--tokenizer-model", help="a tokenizer.json, or a directory that holds one")
    tokenizer.add_argument("--vocab-file", help="vocab.json of GPT2BPETokenizer")
    tokenizer.add_argument("--merge-file", help="merges.txt of GPT2BPETokenizer")
    tokenizer.add_argument("--append-eod", action="store_true", help="end each document with the end-of-document token")
    tokenizer.add_argument("--vocab-size", type=int, help="no effect: the tokenizer says")
    tokenizer.add_argument("--vocab-extra-ids", type=int, help="no effect: there are no sentinel tokens")
    tokenizer.add_argument("--tiktoken-pattern", help="of TikTokenizer")
    tokenizer.add_argument("--tiktoken-num-special-tokens", type=int, help="of TikTokenizer")
    tokenizer.add_argument("--tiktoken-special-tokens", nargs="+", help="of TikTokenizer")

    output = parser.add_argument_group("output data")
    output.add_argument("--output-prefix", required=True, help="<prefix>_<key>_document.bin and .idx are written")
    output.add_argument("--overwrite", action="store_true", help="(not Megatron's) replace datasets that exist")
    output.add_argument("--resume", action="store_true", help="(not Megatron's) go on where a run was interrupted")

    runtime = parser.add_argument_group("runtime")
    runtime.add_argument("--workers", type=int, default=1, help="tokenizing processes")
    runtime.add_argument("--on-error", choices=["fatal", "skip"], default="fatal", help="(not Megatron's) bad lines")
    runtime.add_argument("--partitions", type=int, default=1, help="no effect: the input is cut by itself")
    runtime.add_argument("--keep-sequential-samples", action="store_true", help="always so")
    runtime.add_argument("--log-interval", type=int, help="no effect: progress is drawn all the time")
    runtime.add_argument("--find-optimal-num-workers", action="store_true", help="refused")
    runtime.add_argument("--workers-to-check", nargs="+", type=int, help="of --find-optimal-num-workers")
    runtime.add_argument("--max-documents", type=int, help="of --find-optimal-num-workers")
    runtime.add_argument("--performance-dir", help="of --find-optimal-num-workers")
    return parser.parse_args(argv)


def refuse(flags: argparse.Namespace) -> None:
    """Refuse what would give another result than Megatron's.

    Raises: DataError: with every such flag.
    """
    problems = []
    if flags.split_sentences:
        remedy = "split sentences with Megatron-LM's own tool; it is for BERT-like models"
        problems.append(Problem("--split-sentences", "sentence splitting is not supported", remedy))
    if flags.find_optimal_num_workers:
        remedy = "try a few values of --workers: the rate is printed at the end"
        problems.append(Problem("--find-optimal-num-workers", "is not supported", remedy))
    if problems:
        raise DataError(problems, HERE)


def notes(flags: argparse.Namespace) -> list[str]:
    """Return a line for each flag that was given and changes nothing."""
    lines = []
    if flags.partitions > 1:
        lines.append(
            "--partitions has no effect: the input is cut into parts by itself, and its documents stay in order "
            "(as with --keep-sequential-samples)"
        )
    if flags.log_interval is not None:
        lines.append("--log-interval has no effect: progress is drawn all the time")
    if flags.vocab_size is not None:
        lines.append("--vocab-size has no effect: the tokenizer says how many ids it has")
    if flags.vocab_extra_ids:
        lines.append("--vocab-extra-ids has no effect: there are no sentinel tokens")
    return lines


def open_tokenizer(flags: argparse.Namespace) -> Tokenizer:
    """Open the tokenizer that the flags name.

    Raises: TokenizerError: if it is of a type that we can't run, or its files are missing or malformed.
    """
    if flags.tokenizer_type == "HuggingFaceTokenizer":
        if not flags.tokenizer_model:
            raise TokenizerError(Problem("--tokenizer-model", "is missing", "give a tokenizer.json"), HERE)
        if not Path(flags.tokenizer_model).exists():
            remedy = "nothing is downloaded: give a local tokenizer.json, or the directory that holds it"
            problem = Problem(f"--tokenizer-model {flags.tokenizer_model}", "no such file or directory", remedy)
            raise TokenizerError(problem, HERE)
        return Tokenizer.from_file(flags.tokenizer_model)
    if flags.tokenizer_type == "GPT2BPETokenizer":
        return open_gpt2(flags.vocab_file, flags.merge_file)
    raise TokenizerError(
        Problem(
            f"--tokenizer-type {flags.tokenizer_type}",
            "must be HuggingFaceTokenizer or GPT2BPETokenizer",
            "save the tokenizer as tokenizer.json, and give --tokenizer-type HuggingFaceTokenizer",
        ),
        HERE,
    )


def open_gpt2(vocab_file: str | None, merge_file: str | None) -> Tokenizer:
    """Open GPT-2's own pair of files: ids by token, and a merge a line below a version line.

    Raises: TokenizerError: if one is missing or malformed.
    """
    if not vocab_file or not merge_file:
        problem = Problem("GPT2BPETokenizer", "needs --vocab-file and --merge-file", "give vocab.json and merges.txt")
        raise TokenizerError(problem, HERE)
    return Tokenizer(megatron_files.read(Path(vocab_file), Path(merge_file)))


def run(flags: argparse.Namespace) -> None:
    """Do what the flags say, and print what was done."""
    refuse(flags)
    console = make_console()
    for line in notes(flags):
        console.print(f"note: {line}")
    summary = preprocess(
        [flags.input],
        open_tokenizer(flags),
        flags.output_prefix,
        json_keys=flags.json_keys,
        append_eod=flags.append_eod,
        workers=flags.workers,
        on_error=flags.on_error,
        resume=flags.resume,
        overwrite=flags.overwrite,
        console=console,
    )
    for key, prefix in summary.prefixes.items():
        print(f"{prefix}: {summary.n_documents:,} documents, {summary.n_tokens[key]:,} tokens")
    rates = f"{summary.documents_per_s:,.0f} documents/s, {summary.text_bytes_per_s / 1e6:,.1f} MB/s"
    print(f"{summary.seconds:,.1f} s, {rates}")
    for file, count in summary.n_bad_lines.items():
        console.print(f"{file}: {count:,} bad lines left out")
    for bad in summary.bad_lines:
        console.print(f"  {bad}")


def main(argv: list[str]) -> int:
    """Return the exit code: 2 when the user's input is wrong."""
    return exit_code_of(lambda: run(parse_flags(argv)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
