"""`megascratch tokenizer train|encode|decode|export`."""

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megascratch.errors import ConfigError, Problem, TokenizerError

if TYPE_CHECKING:
    from megascratch.tokenizer import Tokenizer

app = typer.Typer(no_args_is_help=True, help="Train a byte-level BPE tokenizer, use it, and exchange it.")

TokenizerFile = Annotated[Path, typer.Option("--tokenizer", help="A tokenizer.json, or a directory with one.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what exists.")]


class Format(StrEnum):
    """Formats that a tokenizer is written in."""

    hf = "hf"
    tiktoken = "tiktoken"
    megatron = "megatron"
    sentencepiece = "sentencepiece"


@app.command()
def train(
    inputs: Annotated[list[Path], typer.Argument(metavar="INPUT...", help="JSON Lines (.jsonl), or plain text.")],
    vocab_size: Annotated[int, typer.Option(help="Ids in all: 256 bytes, merges and special tokens.")],
    output: Annotated[Path, typer.Option(help="A .json file, or a directory for tokenizer.json.")],
    pattern: Annotated[str, typer.Option(help="Pre-tokenisation: gpt2, cl100k, o200k, llama3 or qwen2.")] = "cl100k",
    json_key: Annotated[str, typer.Option(help="Key that holds the text in JSON Lines.")] = "text",
    special_token: Annotated[
        list[str] | None, typer.Option(help="Instead of <|endoftext|>; repeatable. The first ends a document.")
    ] = None,
    limit_bytes: Annotated[
        int | None, typer.Option(help="Train on about this much of the text, taken evenly from all of it.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Train a tokenizer on text."""
    _require_free(output if output.suffix == ".json" else output / "tokenizer.json", overwrite)
    from megascratch.log import make_console
    from megascratch.tokenizer import END_OF_DOCUMENT
    from megascratch.tokenizer import train as run

    special_tokens = special_token or [END_OF_DOCUMENT]
    trained = run(
        inputs,
        vocab_size,
        pattern,
        special_tokens,
        json_key=json_key,
        limit_bytes=limit_bytes,
        console=make_console(),
    )
    print(f"{trained.save(output)}: {trained.vocab_size:,} ids, {len(special_tokens)} of them special")


@app.command()
def encode(
    tokenizer: TokenizerFile,
    text: Annotated[str | None, typer.Argument(help="Text; standard input when left out.")] = None,
    allow_special: Annotated[
        bool, typer.Option("--allow-special", help="Recognise special tokens written out in the text.")
    ] = False,
) -> None:
    """Print the ids of a text."""
    opened = _open(tokenizer)
    if text is None:
        text = sys.stdin.buffer.read().decode("utf-8", "surrogateescape")
    print(*opened.encode(text, allowed_special="all" if allow_special else ()))


@app.command()
def decode(
    tokenizer: TokenizerFile,
    ids: Annotated[list[str] | None, typer.Argument(help="Ids; standard input when left out.")] = None,
) -> None:
    """Print the text of ids, as exact bytes."""
    opened = _open(tokenizer)
    words = ids if ids else sys.stdin.read().replace(",", " ").split()
    wrong = [word for word in words if not word.isdecimal()]
    if wrong:
        raise ConfigError([Problem(word, "is not a token id", "give whole numbers") for word in wrong[:5]], "the ids")
    data = opened.decode_bytes(int(word) for word in words)
    sys.stdout.flush()
    sys.stdout.buffer.write(data if data.endswith(b"\n") else data + b"\n")


@app.command()
def export(
    source: Annotated[
        Path, typer.Argument(help="tokenizer.json, tokenizer.model, .tiktoken, vocab.json, or a directory with one.")
    ],
    output: Annotated[
        Path, typer.Argument(help="hf: a .json file or a directory. megatron: a directory. Else a file.")
    ],
    to: Annotated[
        Format,
        typer.Option(
            help="hf: tokenizer.json. tiktoken: a file of ranks. megatron: vocab.json and merges.txt. "
            "sentencepiece: tokenizer.model."
        ),
    ] = Format.hf,
    pattern: Annotated[
        str | None, typer.Option(help="Pattern of a .tiktoken source, which does not name it; guessed if left out.")
    ] = None,
    special_token: Annotated[
        list[str] | None, typer.Option(metavar="TEXT=ID", help="Special token of a .tiktoken source; repeatable.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write a tokenizer in another format."""
    from megascratch.tokenizer import formats

    for file in formats.files_of(to, output):
        _require_free(file, overwrite)
    opened = _open(source, pattern, special_token or [])
    files = formats.write(opened, to, output)
    print(f"{' and '.join(map(str, files))}: {opened.vocab_size:,} ids")


def _open(file: Path, pattern: str | None = None, special_tokens: list[str] | None = None) -> "Tokenizer":
    from megascratch.tokenizer import formats

    ids: dict[str, int] = {}
    for assignment in special_tokens or []:
        content, _, id = assignment.rpartition("=")
        if not content or not id.isdecimal():
            remedy = "for example '<|endoftext|>=100257'"
            raise TokenizerError(Problem(assignment, "must have the form TEXT=ID", remedy), "--special-token")
        ids[content] = int(id)
    return formats.open_tokenizer(file, pattern, ids)


def _require_free(file: Path, overwrite: bool) -> None:
    if file.exists() and not overwrite:
        raise TokenizerError(Problem(str(file), "exists already", "add --overwrite, or choose another output"))
