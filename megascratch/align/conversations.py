"""What a record asks for: texts, and which parts of them are to be learned.

    {"messages": [user "Hi", assistant "Hello!"]}        → one sequence, learned where the assistant speaks
    {"prompt": "2 + 2 =", "completion": " 4"}            → one sequence, learned after the prompt
    {"prompt": "2 + 2 =", "completion": " 4", "label": true}                       the same, with its label
    {"prompt": …, "chosen": …, "rejected": …, "margin": 1.5}   → two sequences: chosen, rejected
    {"prompt": "2 + 2 =", "answer": "4"}                 → a prompt, for rollouts

Prompts and completions are texts, or lists of messages that a chat template writes out. Messages that `chosen` and
`rejected` have in common at the beginning are their prompt where none is given.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megascratch.errors import DataError, Problem
from megascratch.tokenizer.chat import ChatTemplate

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Piece:
    """A stretch of text.

    Attributes:
        text: not empty.
        learned: whether its tokens are to be predicted.
        begins: whether the vocabulary's own tokens (a beginning of text) belong before it: no template wrote any.
        ends: whether the end-of-document token follows it.
    """

    text: str
    learned: bool
    begins: bool = False
    ends: bool = False


@dataclass(frozen=True)
class Demand:
    """What a record asks for.

    Attributes:
        sequences: one, or chosen and rejected.
        values: numbers that belong to it: a margin, a label.
    """

    sequences: tuple[tuple[Piece, ...], ...]
    values: Mapping[str, float] = field(default_factory=dict)


def demonstration(record: Mapping[str, Any], template: ChatTemplate) -> Demand:
    """Read a conversation, or a prompt and a completion.

    Raises: DataError: saying what is wrong with the record. TokenizerError: if the template fails on it.
    """
    if "messages" in record:
        return Demand((_conversation(_messages(record["messages"], "messages"), template, 0, record.get("tools")),))
    _require(record, "prompt", "completion", instead="or messages")
    return Demand((_completed(record["prompt"], record["completion"], "completion", template),))


def preference(record: Mapping[str, Any], template: ChatTemplate) -> Demand:
    """Read a pair, the chosen answer first.

    Raises: DataError: saying what is wrong with the record. TokenizerError: if the template fails on it.
    """
    _require(record, "chosen", "rejected")
    prompt, chosen, rejected = record.get("prompt"), record["chosen"], record["rejected"]
    if chosen == rejected:
        raise DataError(Problem("chosen and rejected", "are the same", "leave the pair out"))
    if prompt is None:
        prompt, chosen, rejected = _shared(chosen, rejected)
    margin = record.get("margin", 0.0)
    if isinstance(margin, bool) or not isinstance(margin, (int, float)):
        raise DataError(Problem(f"margin = {margin!r}", "must be a number"))
    answers = (("chosen", chosen), ("rejected", rejected))
    sequences = tuple(_completed(prompt, answer, key, template) for key, answer in answers)
    return Demand(sequences, {"margin": float(margin)})


def labelled(record: Mapping[str, Any], template: ChatTemplate) -> Demand:
    """Read a prompt and a completion that is desirable, or not.

    Raises: DataError: saying what is wrong with the record. TokenizerError: if the template fails on it.
    """
    _require(record, "prompt", "completion", "label")
    if not isinstance(record["label"], bool):
        raise DataError(Problem(f"label = {record['label']!r}", "must be true or false"))
    sequence = _completed(record["prompt"], record["completion"], "completion", template)
    return Demand((sequence,), {"desirable": float(record["label"])})


@dataclass(frozen=True)
class Prompt:
    """What a model is to answer.

    Attributes:
        pieces: the prompt as written out, the generation prompt included.
        answer: what a verifier compares with; None where the record has none.
    """

    pieces: tuple[Piece, ...]
    answer: str | None


def prompt(record: Mapping[str, Any], template: ChatTemplate) -> Prompt:
    """Read a prompt, and the answer that a verifier is to find, if there is one.

    Raises: DataError: saying what is wrong with the record. TokenizerError: if the template fails on it.
    """
    _require(record, "prompt")
    answer = record.get("answer")
    if answer is not None and (isinstance(answer, bool) or not isinstance(answer, (str, int, float))):
        raise DataError(Problem(f"answer = {answer!r}", "must be a text or a number"))
    given = record["prompt"]
    if isinstance(given, str):
        pieces = (Piece(_text(given, "prompt"), learned=False, begins=True),)
    else:
        text = template.render(_messages(given, "prompt"), add_generation_prompt=True)
        pieces = (Piece(text, learned=False),)
    return Prompt(pieces, None if answer is None else str(answer))


def _completed(given: Any, answer: Any, key: str, template: ChatTemplate) -> tuple[Piece, ...]:
    """Return a prompt and an answer to it, the answer alone being learned."""
    if isinstance(given, str) and isinstance(answer, str):
        before = (Piece(given, learned=False, begins=True),) if given else ()
        return (*before, Piece(_text(answer, key), learned=True, begins=not given, ends=True))
    if isinstance(given, list) and isinstance(answer, str):
        answer = [{"role": "assistant", "content": answer}]
    if not isinstance(given, list) or not isinstance(answer, list):
        raise DataError(Problem(f"prompt and {key}", "must be texts, or lists of messages"))
    context = _messages(given, "prompt")
    return _conversation([*context, *_messages(answer, key)], template, len(context))


def _conversation(
    messages: Messages, template: ChatTemplate, n_context: int, tools: Sequence[Mapping[str, Any]] | None = None
) -> tuple[Piece, ...]:
    """Write a conversation out; what the assistant says from message `n_context` on is learned."""
    text, spans = template.render_with_spans(messages, tools)
    n_before = sum(message["role"] == "assistant" for message in messages[:n_context])
    if len(spans) == n_before:
        raise DataError(Problem("the completion", "has no assistant message", "there is nothing to learn from it"))
    pieces, position = [], 0
    for start, stop in spans[n_before:]:
        pieces += [Piece(text[position:start], learned=False), Piece(text[start:stop], learned=True)]
        position = stop
    # What the template writes after the last turn is never said.
    return tuple(piece for piece in pieces if piece.text)


def _messages(value: Any, key: str) -> Messages:
    if not isinstance(value, list) or not value:
        raise DataError(Problem(key, "must be a list of messages"))
    problems = []
    for n, message in enumerate(value):
        if not isinstance(message, dict):
            problems.append(Problem(f"{key}[{n}]", "must be an object with a role and a content"))
            continue
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            problems.append(Problem(f"{key}[{n}].role = {role!r}", f"must be one of {', '.join(ROLES)}"))
        if not content and not message.get("tool_calls"):
            problems.append(Problem(f"{key}[{n}].content", "is empty", "leave the conversation out"))
        elif isinstance(content, str) and not content.strip() and not message.get("tool_calls"):
            problems.append(Problem(f"{key}[{n}].content", "is blank", "leave the conversation out"))
        elif content is not None and not isinstance(content, (str, list)):
            problems.append(Problem(f"{key}[{n}].content", f"must be a text, not {type(content).__name__}"))
    if problems:
        raise DataError(problems)
    return value


def _shared(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """Take what both answers begin with as their prompt: messages alone can tell where it ends."""
    if not isinstance(chosen, list) or not isinstance(rejected, list):
        return "", chosen, rejected
    n = 0
    while n < min(len(chosen), len(rejected)) and chosen[n] == rejected[n]:
        n += 1
    if n == 0:
        raise DataError(Problem("chosen and rejected", "have no message in common", "give a prompt"))
    return chosen[:n], chosen[n:], rejected[n:]


def _text(value: str, key: str) -> str:
    if not value.strip():
        raise DataError(Problem(key, "is blank", "leave the record out"))
    return value


def _require(record: Mapping[str, Any], *keys: str, instead: str = "") -> None:
    missing = [key for key in keys if key not in record]
    if missing:
        remedy = f"give {', '.join(keys)} {instead}".rstrip()
        raise DataError([Problem(key, "is missing", remedy) for key in missing])
