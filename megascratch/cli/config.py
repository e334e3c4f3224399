"""`megascratch config`: check a recipe, and print it with everything that follows from it."""

from typing import Annotated

import typer

from megascratch.cli.recipe import RecipeArguments, split_arguments


def config(
    arguments: RecipeArguments = None,
    list_presets: Annotated[bool, typer.Option("--list-presets", help="Print the model presets instead.")] = False,
) -> None:
    """Check a recipe and print it as TOML, resolved: presets filled in, defaults shown."""
    from megascratch.config import load_config, to_toml

    if list_presets:
        _print_presets()
        return
    recipe, overrides = split_arguments(arguments)
    print(to_toml(load_config(recipe, overrides)), end="")


def _print_presets() -> None:
    from rich.console import Console
    from rich.table import Table

    from megascratch.config import PRESETS

    columns = ("n_layers", "hidden", "n_heads", "n_kv_heads", "ffn_hidden", "vocab_size", "max_seq_length")
    table = Table("preset", *columns, box=None)
    for name, shape in PRESETS.items():
        shape = {"n_kv_heads": shape["n_heads"], **shape}
        table.add_row(name, *(str(shape.get(column, "")) for column in columns))
    # Wide enough for all columns also in a pipe, where there is no terminal to ask.
    Console(width=120, highlight=False).print(table)
