"""`megascratch inspect`: what a dataset, a tokenizer or a checkpoint holds, in plain words."""

from pathlib import Path
from typing import Annotated

import typer

from megascratch.errors import ConfigError, Problem

_EXAMPLE = "def read_lines(path):\n    return open(path).read().splitlines()  # naïve, 12345 lines"


def inspect(
    source: Annotated[
        str,
        typer.Argument(
            metavar="PATH", help="A dataset's prefix (or its .bin or .idx), a tokenizer, a checkpoint or its URL."
        ),
    ],
    tokenizer: Annotated[Path | None, typer.Option(help="Shows a dataset's first documents as text.")] = None,
    documents: Annotated[int, typer.Option(min=0, help="How many documents of a dataset to show.")] = 3,
    verify: Annotated[bool, typer.Option("--verify", help="Read all of a checkpoint against its checksums.")] = False,
) -> None:
    """Describe a dataset, a tokenizer or a checkpoint."""
    from megascratch.tokenizer import formats

    path, local = Path(source), "://" not in source
    if not local:
        from megascratch.checkpoint.places import place  # it loads torch

        path = place(source)
    prefix = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
    if local and any(Path(f"{prefix}{suffix}").is_file() for suffix in (".bin", ".idx")):
        _inspect_dataset(prefix, tokenizer, documents)
    elif any((path / name).is_file() for name in ("manifest.json", "latest")):
        _inspect_checkpoint(path, verify)
    elif local and formats.is_tokenizer(path):
        _inspect_tokenizer(path)
    else:
        rule = "is no dataset (.bin and .idx), tokenizer (such as tokenizer.json) or checkpoint (manifest.json, latest)"
        raise ConfigError(Problem(source, rule if path.exists() else "no such file", "check the path"))


def _inspect_dataset(prefix: Path, tokenizer_file: Path | None, documents: int) -> None:
    from megascratch.data.describe import describe_dataset
    from megascratch.tokenizer import formats

    tokenizer = formats.open_tokenizer(tokenizer_file) if tokenizer_file is not None else None
    dataset = describe_dataset(prefix, tokenizer, n_documents=documents)
    quantiles = ", ".join(f"{length:,} at {100 * q:g} %" for q, length in dataset.length_quantiles.items())
    _print_rows(
        f"dataset {dataset.prefix}",
        {
            "documents": f"{dataset.n_documents:,} in {dataset.n_sequences:,} sequences",
            "tokens": f"{dataset.n_tokens:,} as {dataset.dtype}",
            "tokens a sequence": quantiles or "none",
            "modes": "one a sequence" if dataset.has_modes else "none",
            "files": f"{_size(dataset.bin_bytes)} .bin, {_size(dataset.idx_bytes)} .idx",
        },
    )
    for start in dataset.starts:
        more = "" if len(start.ids) == start.n_tokens else f", the first {len(start.ids)}"
        print(f"\ndocument {start.document}: {start.n_tokens:,} tokens{more}")
        print(" ".join(map(str, start.ids)) if start.text is None else start.text)
    if dataset.starts and tokenizer is None:
        print("\nadd --tokenizer to see text")


def _inspect_tokenizer(path: Path) -> None:
    from megascratch.tokenizer import formats

    tokenizer = formats.open_tokenizer(path)
    ids = tokenizer.encode(_EXAMPLE)
    n_bytes = len(_EXAMPLE.encode())
    pieces = "|".join(tokenizer.decode_bytes([id]).decode("utf-8", "replace") for id in ids)
    by_length = tokenizer.byte_lengths().argsort(kind="stable")[::-1].tolist()
    words = [text for id in by_length if (text := tokenizer.decode([id])).strip().isalnum()]
    _print_rows(
        f"tokenizer {path}",
        {
            "ids": f"{tokenizer.vocab_size:,}, of which {len(tokenizer.special_tokens):,} special",
            "special tokens": ", ".join(f"{text} = {id}" for text, id in tokenizer.special_tokens.items()) or "none",
            "ends a document": "nothing" if tokenizer.eod_id is None else f"id {tokenizer.eod_id}",
            "pattern": tokenizer.vocabulary.pattern,
            "longest words": " ".join(map(repr, words[:8])),
        },
    )
    print(f"\nan example: {n_bytes} bytes in {len(ids)} tokens, {n_bytes / len(ids):.2f} bytes a token")
    print(pieces)


def _inspect_checkpoint(path: Path, verify: bool) -> None:
    from megascratch.checkpoint.inspect import describe
    from megascratch.checkpoint.inspect import verify as read_all
    from megascratch.log import make_console

    checkpoint = describe(path)
    weights = {name: record for name, record in checkpoint.tensors.items() if not name.startswith("optim/")}
    n_state = len(checkpoint.tensors) - len(weights)
    layout = " × ".join(f"{axis} {size}" for axis, size in checkpoint.layout.items())
    model = checkpoint.config.get("model", {})
    _print_rows(
        f"checkpoint {checkpoint.path}",
        {
            "step": f"{checkpoint.step:,}, {checkpoint.consumed_samples:,} samples consumed",
            "parameters": f"{checkpoint.n_parameters:,} in {len(weights):,} tensors",
            "optimizer state": f"{n_state:,} tensors" if n_state else "none",
            "size": f"{_size(checkpoint.bytes)} in {checkpoint.n_files:,} files",
            "saved by": layout or "a layout that is not recorded",
            "model": ", ".join(f"{key} {value}" for key, value in model.items() if value is not None) or "not recorded",
        },
    )
    print()
    for name, record in weights.items():
        print(f"{name:<40} {record.dtype:<5} {' × '.join(map(str, record.shape))}")
    if verify:
        read_all(path, make_console())
        print("\nall checksums match")


def _print_rows(title: str, rows: dict[str, str]) -> None:
    print(title)
    for name, value in rows.items():
        print(f"  {name:<18} {value}")


def _size(n_bytes: int) -> str:
    from rich.filesize import decimal

    return decimal(n_bytes)
