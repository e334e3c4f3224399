"""`megascratch pretrain`: train a model on indexed datasets."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megascratch.cli.recipe import RecipeArguments, split_arguments
from megascratch.errors import EXIT_USER_ERROR, ConfigError, DataError, Problem, TokenizerError, UserError

if TYPE_CHECKING:
    from megascratch.config import Config


def pretrain(
    arguments: RecipeArguments = None,
    max_restarts: Annotated[
        int, typer.Option(min=0, help="How often ranks started here are started again after one has failed.")
    ] = 0,
) -> None:
    """Pretrain a model. Running it again resumes from the newest checkpoint, on the same layout or another."""
    from megascratch.cli.ranks import run_ranks
    from megascratch.config import load_config
    from megascratch.dist.launch import environment
    from megascratch.engine import pretrain as stage

    env = environment()
    try:
        recipe, overrides = split_arguments(arguments)
        config = load_config(recipe, overrides, world_size=env.world_size if env else None)
        config = checked_inputs(config, str(recipe or "the command line"))
    except UserError:
        if env is not None and env.rank != 0:
            raise typer.Exit(EXIT_USER_ERROR) from None  # rank 0 reads the same recipe, and prints
        raise
    parallel = config.parallel
    n_ranks = parallel.tp * parallel.pp * parallel.cp * (parallel.dp or 1)
    raise typer.Exit(run_ranks(stage, config, n_ranks, max_restarts, config.checkpoint.deadline_s))


def checked_inputs(config: "Config", where: str) -> "Config":
    """Open everything that a configuration names, and put in the vocabulary size that it leaves to the tokenizer.

    Raises: ConfigError: with every file that is missing or unusable.
    """
    from megascratch.data.merge import open_datasets

    problems: list[Problem] = []
    if config.data.paths:
        try:
            open_datasets(config.data.paths)
        except DataError as error:
            problems += _led_by(error)
    else:
        problems.append(Problem("data.paths", "names no dataset", "give the prefixes that preprocess printed"))
    problems += schedule_problems(config)
    vocab_size, tokenizer_problems = vocab_size_of(config)
    problems += tokenizer_problems
    if problems:
        raise ConfigError(problems, where)
    return config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": vocab_size})})


def schedule_problems(config: "Config") -> list[Problem]:
    """Return what is wrong with a schedule that the user wrote, or that is to keep to a limit."""
    from megascratch.pipeline import configured_schedule

    if config.parallel.schedule_file is None and config.parallel.max_in_flight is None:
        return []
    n_microbatches = config.train.global_batch // (config.train.micro_batch * (config.parallel.dp or 1))
    try:
        configured_schedule(config.parallel, n_microbatches)
    except UserError as error:
        return _led_by(error)
    return []


def vocab_size_of(config: "Config") -> tuple[int | None, list[Problem]]:
    """Return the model's vocabulary size, or the tokenizer's when it is left out, and what is wrong with them."""
    from megascratch.tokenizer import formats

    stated = config.model.vocab_size
    if config.data.tokenizer is None:
        if stated is None:
            return None, [Problem("model.vocab_size", "must be given", "set it, or set data.tokenizer")]
        return stated, []
    try:
        tokenizer = formats.open_tokenizer(Path(config.data.tokenizer))
    except TokenizerError as error:
        return None, _led_by(error)
    if stated is not None and stated < tokenizer.vocab_size:
        rule = f"must be at least the tokenizer's {tokenizer.vocab_size}"
        return None, [Problem(f"model.vocab_size = {stated}", rule, "raise it, or leave it out")]
    return stated or tokenizer.vocab_size, []


def _led_by(error: UserError) -> list[Problem]:
    """Return an error's problems, each led by the file that it is in."""
    lead = f"{error.where}: " if error.where else ""
    return [Problem(f"{lead}{problem.value}", problem.rule, problem.remedy) for problem in error.problems]
