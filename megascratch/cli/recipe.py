"""The arguments of every verb that reads a recipe: `[RECIPE.toml] [section.key=value ...]`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from megascratch.errors import ConfigError, Problem

RecipeArguments = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="RECIPE.toml section.key=value",
        help="A recipe, and values that replace its own: run.toml train.steps=100 parallel.tp=2",
        show_default=False,
    ),
]


def split_arguments(arguments: Sequence[str] | None) -> tuple[Path | None, list[str]]:
    """Tell the recipe from the overrides: an override has an equals sign.

    Returns: (recipe or None, overrides).

    Raises: ConfigError: if there are two recipes.
    """
    recipes = [argument for argument in arguments or () if "=" not in argument]
    overrides = [argument for argument in arguments or () if "=" in argument]
    if len(recipes) > 1:
        rule = "one recipe at most; everything else has the form section.key=value"
        problems = [Problem(recipe, rule, "for example train.steps=100") for recipe in recipes[1:]]
        raise ConfigError(problems, "the command line")
    return (Path(recipes[0]) if recipes else None), overrides
