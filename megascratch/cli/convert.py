"""`megascratch convert`: a checkpoint for another layout, and to and from Hugging Face's format."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from megascratch.errors import ConfigError, Problem


class Format(StrEnum):
    """Formats other than our own."""

    hf = "hf"


class DType(StrEnum):
    """Dtypes of weights on disk."""

    fp64 = "fp64"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="A checkpoint, or a folder of the format of --from.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="A folder that does not exist yet.")],
    tp: Annotated[int | None, typer.Option(min=1, help="Tensor-parallel ranks to write for; 1 when left out.")] = None,
    pp: Annotated[int | None, typer.Option(min=1, help="Pipeline ranks to write for; 1 when left out.")] = None,
    to: Annotated[Format | None, typer.Option(help="Write another format.")] = None,
    from_: Annotated[Format | None, typer.Option("--from", help="Read another format.")] = None,
    dtype: Annotated[DType | None, typer.Option(help="Of the weights; goes with --weights-only.")] = None,
    weights_only: Annotated[bool, typer.Option("--weights-only", help="Leave the optimizer state behind.")] = False,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Goes into the folder of --to hf; the checkpoint's own when left out.")
    ] = None,
) -> None:
    """Rewrite a checkpoint. Any layout loads any checkpoint without this: it is for speed, and for other software."""
    layout = {"--tp": tp, "--pp": pp, "--dtype": dtype, "--weights-only": weights_only or None}
    given = [name for name, value in layout.items() if value is not None]
    if to and from_:
        raise ConfigError(Problem("--to and --from", "exclude each other", "convert twice"), "the command line")
    if given and (to or from_):
        rule = "belongs to a conversion between our own checkpoints"
        raise ConfigError([Problem(name, rule, "convert twice, or leave it out") for name in given], "the command line")
    if tokenizer is not None and not to:
        raise ConfigError(Problem("--tokenizer", "belongs to --to hf", "leave it out"), "the command line")

    from megascratch import checkpoint
    from megascratch.log import make_console

    console = make_console()
    if to:
        written = checkpoint.to_hf(source, target, tokenizer or _tokenizer_of(source), console=console)
    elif from_:
        written = checkpoint.from_hf(source, target, console=console)
    else:
        written = checkpoint.convert(
            source,
            target,
            tp=tp or 1,
            pp=pp or 1,
            dtype=dtype.value if dtype else None,
            weights_only=weights_only,
            console=console,
        )
    n_bytes = sum(file.stat().st_size for file in written.iterdir())
    print(f"{written}: {n_bytes / 1e6:,.1f} MB in {len(list(written.iterdir()))} files")


def _tokenizer_of(source: Path) -> Path | None:
    """Return the tokenizer that a checkpoint's configuration names, if it is still there."""
    from megascratch import checkpoint

    file = checkpoint.describe(source).config.get("data", {}).get("tokenizer")
    return Path(file) if file and Path(file).exists() else None
