"""`megascratch convert`: a checkpoint for another layout, precision or format."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from megascratch.errors import ConfigError, Problem


class Format(StrEnum):
    """What weights stand in."""

    megascratch = "megascratch"
    hf = "hf"
    dcp = "dcp"
    megatron = "megatron"
    megatron_dist = "megatron-dist"
    peft = "peft"  # adapters alone; written, not read


class DType(StrEnum):
    """Dtypes of weights on disk."""

    fp64 = "fp64"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="A checkpoint, or a folder of another format.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="A folder that does not exist yet.")],
    tp: Annotated[int, typer.Option(min=1, help="Tensor-parallel ranks to write for.")] = 1,
    pp: Annotated[int, typer.Option(min=1, help="Pipeline ranks to write for.")] = 1,
    to: Annotated[Format, typer.Option(help="Format to write.")] = Format.megascratch,
    from_: Annotated[Format | None, typer.Option("--from", help="Format of SRC; recognised when left out.")] = None,
    dtype: Annotated[DType | None, typer.Option(help="Of the weights; unchanged when left out.")] = None,
    weights_only: Annotated[bool, typer.Option("--weights-only", help="Leave the optimizer state behind.")] = False,
    merge: Annotated[bool, typer.Option("--merge", help="Put adapters into the weights that they adapt.")] = False,
    family: Annotated[
        str | None, typer.Option(help="For hf and dcp: as which family, where several have the model.")
    ] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="For hf and dcp: the source's own when left out.")] = None,
) -> None:
    """Rewrite a checkpoint. Any layout loads any checkpoint without this: it is for speed, and for other software."""
    if from_ == "peft":
        raise ConfigError(Problem("--from peft", "is written, and not read", "leave it out"), "the command line")
    _refuse(to, {"--tp": tp > 1, "--pp": pp > 1, "--family": family, "--tokenizer": tokenizer})

    from megascratch import checkpoint
    from megascratch.log import make_console

    written = checkpoint.convert(
        source,
        target,
        from_=from_.value if from_ else None,
        to=to.value,
        tp=tp,
        pp=pp,
        dtype=dtype.value if dtype else None,
        weights_only=weights_only,
        family=family,
        tokenizer=tokenizer,
        merge=merge,
        console=make_console(),
    )
    files = [file for file in written.rglob("*") if file.is_file()]
    print(f"{written}: {sum(file.stat().st_size for file in files) / 1e6:,.1f} MB in {len(files)} files")


def _refuse(to: Format, given: dict[str, object]) -> None:
    """Raise a ConfigError with every option that the format has no use for."""
    layout, model = ("--tp", "--pp"), ("--family", "--tokenizer")
    used = {
        Format.megascratch: layout,
        Format.hf: model,
        Format.dcp: model,
        Format.megatron: layout,
        Format.megatron_dist: (),
        Format.peft: (),
    }[to]
    problems = [
        Problem(name, f"has no meaning for --to {to.value}", "leave it out")
        for name, value in given.items()
        if value and name not in used
    ]
    if problems:
        raise ConfigError(problems, "the command line")
