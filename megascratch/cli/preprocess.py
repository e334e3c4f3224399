"""`megascratch preprocess`: a corpus to indexed datasets of token ids."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class OnError(StrEnum):
    """What a bad line does."""

    fatal = "fatal"
    skip = "skip"


class Engine(StrEnum):
    """Where the workers run."""

    local = "local"
    ray = "ray"


def preprocess(
    input: Annotated[
        list[str], typer.Option(help="A file or pattern: JSON Lines, .txt or .parquet; .gz or .zst. Repeatable.")
    ],
    tokenizer: Annotated[Path, typer.Option(help="A tokenizer's file or folder, of any format.")],
    output_prefix: Annotated[Path, typer.Option(help="Datasets are named <prefix>_<key>_document.bin and .idx.")],
    json_keys: Annotated[list[str] | None, typer.Option(help="Key to tokenize, text by default; repeatable.")] = None,
    append_eod: Annotated[bool, typer.Option("--append-eod", help="End each document with the EOD token.")] = False,
    workers: Annotated[int, typer.Option(help="Tokenizing processes.")] = 1,
    engine: Annotated[Engine, typer.Option(help="Workers on this machine, or on its Ray cluster.")] = Engine.local,
    on_error: Annotated[OnError, typer.Option(help="A bad line stops everything, or is left out.")] = OnError.fatal,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an interrupted run stopped.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace datasets that exist.")] = False,
    max_document_mb: Annotated[int, typer.Option(min=1, help="Refuse a longer line, text or value.")] = 64,
    max_expansion: Annotated[int, typer.Option(min=1, help="Refuse a file that expands more when unpacked.")] = 200,
) -> None:
    """Tokenize a corpus into Megatron's .bin and .idx."""
    from megascratch.data.corpus import Limits
    from megascratch.data.preprocess import preprocess as run
    from megascratch.log import make_console
    from megascratch.tokenizer import formats

    console = make_console()
    opened = formats.open_tokenizer(tokenizer)
    if opened.cut_by_regex:
        console.print("slow: no scanner of ours knows this tokenizer's pattern, so `regex` cuts the text (some 20×)")
    summary = run(
        input,
        opened,
        output_prefix,
        json_keys=json_keys or ["text"],
        append_eod=append_eod,
        workers=workers,
        engine=engine.value,
        on_error=on_error.value,
        resume=resume,
        overwrite=overwrite,
        limits=Limits(max_document_mb << 20, max_expansion),
        console=console,
    )
    for bad in summary.bad_lines:
        console.print(f"left out {bad}", markup=False)
    n_bad = sum(summary.n_bad_lines.values())
    if n_bad > len(summary.bad_lines):
        console.print(f"left out {n_bad - len(summary.bad_lines):,} more bad lines")
    for key, prefix in summary.prefixes.items():
        print(f"{prefix}: {summary.n_documents:,} documents, {summary.n_tokens[key]:,} tokens")
    print(
        f"{summary.n_text_bytes / 1e6:,.1f} MB in {summary.seconds:,.1f} s: {summary.text_bytes_per_s / 1e6:,.1f} MB/s,"
        f" {summary.documents_per_s:,.0f} documents/s, {summary.tokens_per_s:,.0f} tokens/s, {n_bad:,} bad lines"
    )
