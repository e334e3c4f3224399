"""Prompts for rollouts, read from `data.paths`: {"prompt": text or messages, "answer": what verifiers compare with}."""

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from megascratch.align.conversations import Piece, prompt
from megascratch.align.examples import encode_pieces, open_template
from megascratch.align.records import read_records
from megascratch.align.rollout import Question
from megascratch.align.rollouts import Language
from megascratch.config import ChatConfig, Config
from megascratch.errors import ConfigError, DataError, Problem, TokenizerError, UserError
from megascratch.tokenizer import Tokenizer, formats

_SHOWN = 10


def read_questions(config: Config, console: Console) -> list[Question]:
    """Read every prompt.

    Args:
        config: resolved; a prompt leaves room for `rollout.max_tokens` in `data.seq_length`.
        console: for what is left out.

    Raises: DataError: if no prompt can be used or, in a strict recipe, one cannot. TokenizerError: if tokenizer or
        template cannot be used.
    """
    assert config.rollout is not None
    tokenizer, template = open_language(config), open_template(config)
    most = config.data.seq_length - config.rollout.max_tokens
    problems: list[Problem] = []
    questions: list[Question] = []
    for where, record in read_records(config.data.paths):
        if isinstance(record, Problem):
            problems.append(_led(where, record))
            continue
        try:
            asked = prompt(record, template)
        except (DataError, TokenizerError) as error:
            problems += [_led(where, problem) for problem in error.problems]
            continue
        ids = _encoded(tokenizer, asked.pieces)
        if len(ids) > most:
            rule = f"must leave room for rollout.max_tokens = {config.rollout.max_tokens}: {most:,} tokens at the most"
            problems.append(_led(where, Problem(f"a prompt of {len(ids):,} tokens", rule, "raise data.seq_length")))
            continue
        text = "".join(piece.text for piece in asked.pieces)
        questions.append(Question(where, ids, text, {**record, "answer": asked.answer}))
    if problems and (not questions or (config.chat or ChatConfig()).strict):
        raise DataError(problems[:_SHOWN], "data.paths")
    if not questions:
        raise DataError(Problem("no record", "is in the files", "give data.paths"), "data.paths")
    if problems:
        console.print(f"left out, {len(questions):,} prompts remain: {UserError(problems[:_SHOWN], 'data.paths')}")
    return questions


def open_language(config: Config) -> Tokenizer:
    """Return the tokenizer that a recipe names.

    Raises: ConfigError: if it names none. TokenizerError: if it cannot be used.
    """
    if config.data.tokenizer is None:
        raise ConfigError(Problem("data.tokenizer", "must be given", "prompts are read as text"))
    return formats.open_tokenizer(Path(config.data.tokenizer))


def language_of(config: Config) -> Language:
    """Return what a policy speaks, and what ends its completions.

    Raises: ConfigError: if a stop is not one token, or nothing ends a completion.
    """
    assert config.rollout is not None
    tokenizer = open_language(config)
    stops = [] if tokenizer.eod_id is None else [tokenizer.eod_id]
    problems = []
    for text in config.rollout.stop:
        ids = tokenizer.encode(text, allowed_special="all")
        if len(ids) == 1:
            stops += ids
        else:
            problems.append(Problem(f"rollout.stop: {text!r}", f"must be one token, and is {len(ids)}"))
    if not stops and not problems:
        problems.append(Problem("rollout.stop", "must name a token: the tokenizer has no end of document"))
    if problems:
        raise ConfigError(problems)
    return Language(tokenizer.decode, stops, tokenizer.vocab_size)


def _encoded(tokenizer: Tokenizer, pieces: Sequence[Piece]) -> torch.Tensor:
    return torch.cat([torch.from_numpy(ids) for ids in encode_pieces(tokenizer, pieces)]).long()


def _led(where: str, problem: Problem) -> Problem:
    return Problem(f"{where}: {problem.value}", problem.rule, problem.remedy)
