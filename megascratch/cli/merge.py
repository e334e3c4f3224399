"""`megascratch merge`: several indexed datasets into one."""

from pathlib import Path
from typing import Annotated

import typer


def merge(
    prefixes: Annotated[list[Path], typer.Argument(metavar="PREFIX...", help="Datasets, without .bin and .idx.")],
    output_prefix: Annotated[Path, typer.Option(help="Of the merged dataset.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a dataset that exists.")] = False,
) -> None:
    """Join datasets: all documents of the first, then of the second, and so on."""
    from megascratch.data.merge import merge_datasets
    from megascratch.log import make_console

    merged = merge_datasets(prefixes, output_prefix, overwrite=overwrite, console=make_console())
    print(f"{merged.prefix}: {merged.n_documents:,} documents, {merged.n_tokens:,} tokens")
