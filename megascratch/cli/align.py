"""`megascratch sft`, `reward`, `dpo`, `ppo`, `grpo`: train on conversations, pairs, labelled answers, or rewards."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megascratch.cli.pretrain import schedule_problems, vocab_size_of
from megascratch.cli.recipe import RecipeArguments, split_arguments
from megascratch.errors import EXIT_USER_ERROR, CheckpointError, ConfigError, Problem, UserError

if TYPE_CHECKING:
    from megascratch.config import Config

Preview = Annotated[int, typer.Option(help="Print so many examples, with what is learned of them, and do not train.")]


def sft(arguments: RecipeArguments = None, preview: Preview = 0) -> None:
    """Train on what the assistant says in conversations."""
    _align("sft", arguments, preview)


def reward(arguments: RecipeArguments = None, preview: Preview = 0) -> None:
    """Train a reward model on pairs: one score for each answer."""
    _align("reward", arguments, preview)


def dpo(arguments: RecipeArguments = None, preview: Preview = 0) -> None:
    """Train on pairs, or on labelled answers, by direct preference optimisation or one of its family."""
    _align("dpo", arguments, preview)


def ppo(arguments: RecipeArguments = None) -> None:
    """Improve a model by rewards of its own completions, with a critic: proximal policy optimisation."""
    _align("ppo", arguments)


def grpo(arguments: RecipeArguments = None) -> None:
    """Improve a model by comparing completions of the same prompt: GRPO, Dr. GRPO, DAPO, GSPO, RLOO."""
    _align("grpo", arguments)


def _align(verb: str, arguments: list[str] | None, preview: int = 0) -> None:
    from megascratch.align.methods import METHODS
    from megascratch.align.preview import show_examples
    from megascratch.cli.ranks import run_ranks
    from megascratch.dist.launch import environment
    from megascratch.engine import train

    env = environment()
    try:
        recipe, overrides = split_arguments(arguments)
        config = configured(verb, recipe, overrides, env.world_size if env else None)
    except UserError:
        if env is not None and env.rank != 0:
            raise typer.Exit(EXIT_USER_ERROR) from None  # rank 0 reads the same recipe, and prints
        raise
    method = METHODS[verb]
    if preview and method.reader is not None:
        show_examples(config, method.reader(config), preview)
        return
    parallel = config.parallel
    n_ranks = parallel.tp * parallel.pp * parallel.cp * (parallel.dp or 1)
    raise typer.Exit(run_ranks(partial(train, method=method.open), config, n_ranks))


def configured(verb: str, recipe: Path | None, overrides: list[str], world_size: int | None) -> "Config":
    """Return a checked configuration; shape and tokenizer are those of `checkpoint.init` where the recipe has none.

    Raises: UserError: with every problem found.
    """
    from megascratch.align.methods import METHODS
    from megascratch.config import config_from_dict, read_recipe

    where = str(recipe or "the command line")
    raw = read_recipe(recipe, overrides)
    raw.setdefault("chat", {})
    init = raw.get("checkpoint", {}).get("init")
    if isinstance(init, str):
        raw = _like_its_start(raw, Path(init))
    raw["model"] = {**raw.get("model", {}), "head": METHODS[verb].head}
    config = config_from_dict(raw, world_size=world_size, where=where)
    problems = schedule_problems(config)
    if not config.data.paths:
        problems.append(Problem("data.paths", "names no file", "give .jsonl or .parquet files"))
    vocab_size, tokenizer_problems = vocab_size_of(config)
    problems += tokenizer_problems
    if problems:
        raise ConfigError(problems, where)
    return config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": vocab_size})})


def _like_its_start(raw: Mapping[str, Any], init: Path) -> dict[str, Any]:
    """Put in the model and the tokenizer of the checkpoint that a run starts from, where the recipe has none."""
    from megascratch.checkpoint import find, read_state
    from megascratch.infer.load import TOKENIZER

    directory = find(init)
    saved = read_state(directory).get("config")
    if not isinstance(saved, dict):
        rule = "has no configuration, so its model's shape is not known"
        raise CheckpointError(Problem(str(directory), rule, "give model in the recipe, and checkpoint.load"))
    model = {key: value for key, value in saved["model"].items() if key not in ("preset", "dropout", "head")}
    data = dict(raw.get("data", {}))
    places = [directory / TOKENIZER, directory.resolve().parent.parent / TOKENIZER]
    found = next((str(place) for place in places if place.is_file()), saved.get("data", {}).get("tokenizer"))
    if found is not None:
        data.setdefault("tokenizer", found)
    return {**raw, "model": {**model, **raw.get("model", {})}, "data": data}
