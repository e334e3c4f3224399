"""Questions in JSON Lines: multiple choice by likelihood, and exact match of what the model says.

    {"context": "The capital of France is", "choices": [" Paris", " Rome"], "answer": 0}      multiple choice
    {"prompt": "2 + 2 =", "answer": "4"}                                                     exact match

The answer of a multiple choice is the number of the right choice, its letter, or its text. The model's is the choice
that it finds likeliest: by log-probability (`accuracy`), and by log-probability a byte, which does not favour short
ones (`accuracy_norm`), as the lm-evaluation-harness has it.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megascratch.errors import DataError, Problem
from megascratch.evals.continuations import Examinee
from megascratch.infer import Sampling

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_SHOWN = 10


@dataclass(frozen=True)
class Choice:
    """A question with given answers, the `right`-th of which is right."""

    context: str
    choices: tuple[str, ...]
    right: int


@dataclass(frozen=True)
class Open:
    """A question whose answer is to be found."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Result:
    """What came of a file of questions: how many there are, and the shares of right answers by name."""

    n: int
    shares: dict[str, float]


def read_questions(path: Path) -> list[Choice] | list[Open]:
    """Read a file whose questions are all of one kind.

    Raises: DataError: with every line that is no question, or of the other kind.
    """
    problems, questions = [], []
    for where, record in _records(path):
        try:
            questions.append(_choice(record) if "choices" in record else _open(record))
        except DataError as error:
            problems += [Problem(f"{where}: {p.value}", p.rule, p.remedy) for p in error.problems]
    kinds = {type(question) for question in questions}
    if len(kinds) > 1:
        problems.append(Problem(str(path), "has questions with choices and without", "give them in two files"))
    if not questions and not problems:
        problems.append(Problem(str(path), "has no question"))
    if problems:
        raise DataError(problems[:_SHOWN], str(path))
    return questions  # type: ignore[return-value]


def examine(
    examinee: Examinee,
    questions: Sequence[Choice] | Sequence[Open],
    max_tokens: int = 64,
    stops: Sequence[str] = ("\n",),
) -> Result:
    """Have a model answer questions. Every rank of its mesh calls this.

    Args:
        examinee: the model.
        questions: of one kind.
        max_tokens, stops: of open answers.

    Raises: DataError: if a context and its choice do not meet between tokens' bounds: it leaves nothing to score.
    """
    if isinstance(questions[0], Choice):
        return _choose(examinee, [question for question in questions if isinstance(question, Choice)])
    asked = [question for question in questions if isinstance(question, Open)]
    contexts = [examinee.tokenizer.encode(question.prompt) or [examinee.prefix_id] for question in asked]
    said = examinee.generate(contexts, Sampling(temperature=0), max_tokens, stops)
    right = sum(text.strip() == question.answer.strip() for text, question in zip(said, asked))
    return Result(len(asked), {"exact_match": right / len(asked)})


def _choose(examinee: Examinee, questions: Sequence[Choice]) -> Result:
    pairs = [encode_pair(examinee, question.context, choice) for question in questions for choice in question.choices]
    scores = iter(examinee.score(pairs))
    right = right_by_byte = 0
    for question in questions:
        logprobs = [next(scores).logprob for _ in question.choices]
        by_byte = [logprob / len(choice.encode()) for logprob, choice in zip(logprobs, question.choices)]
        right += logprobs.index(max(logprobs)) == question.right
        right_by_byte += by_byte.index(max(by_byte)) == question.right
    n = len(questions)
    return Result(n, {"accuracy": right / n, "accuracy_norm": right_by_byte / n})


def encode_pair(examinee: Examinee, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Encode a context and what follows it as one text, cut where the context's own tokens end.

    Spaces at the context's end belong to the continuation: most vocabularies have them with the word that follows.

    Raises: DataError: if nothing is left of the continuation.
    """
    encode = examinee.tokenizer.encode
    if not context:
        return [examinee.prefix_id], encode(continuation)
    stripped = context.rstrip()
    before = encode(stripped) if stripped else [examinee.prefix_id]
    whole = encode(context + continuation) if stripped else [examinee.prefix_id, *encode(context + continuation)]
    if len(whole) <= len(before):
        rule = "melts into the last token of its context"
        raise DataError(Problem(f"the choice {continuation!r}", rule, "begin it with a space"))
    return before, whole[len(before) :]


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(Problem(str(path), f"cannot be read: {error}", "give a file of JSON Lines")) from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(Problem(f"line {number}", f"is not JSON: {error}"), str(path)) from None
        if not isinstance(record, dict):
            raise DataError(Problem(f"line {number}", "is no JSON object"), str(path))
        yield f"line {number}", record


def _choice(record: dict[str, Any]) -> Choice:
    context, choices, answer = (
        record.get("context", record.get("question", "")),
        record["choices"],
        record.get("answer"),
    )
    if not isinstance(context, str) or not isinstance(choices, list) or len(choices) < 2:
        raise DataError(Problem("a question", "needs a context, and two choices or more"))
    if not all(isinstance(choice, str) and choice for choice in choices):
        raise DataError(Problem("choices", "must be texts that are not empty"))
    if isinstance(answer, str) and answer in choices:
        right = choices.index(answer)
    elif isinstance(answer, str) and len(answer) == 1 and answer in _LETTERS:
        right = _LETTERS.index(answer)
    else:
        right = answer if isinstance(answer, int) and not isinstance(answer, bool) else -1
    if not 0 <= right < len(choices):
        rule = f"must be 0 to {len(choices) - 1}, a letter, or one of the choices"
        raise DataError(Problem(f"answer = {answer!r}", rule))
    return Choice(context, tuple(choices), right)


def _open(record: dict[str, Any]) -> Open:
    prompt, answer = record.get("prompt"), record.get("answer")
    if not isinstance(prompt, str) or answer is None or isinstance(answer, (bool, list, dict)):
        raise DataError(Problem("a question", "needs choices, or a prompt and an answer"))
    return Open(prompt, str(answer))
