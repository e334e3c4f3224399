"""What a completion is worth: a Python function, or a verifier that compares it with the record's answer.

    function    `module:function`, called as function(prompt, completion, record) → number
    regex       1 where a pattern is found; where it has a group named `answer`, that must be the record's answer
    number      1 where the last number of the completion is the record's answer, as a number: 1,200 is 1200.0

A function is the user's code: it may raise, return no number, or never return. It runs in a process of its own, which
is ended when an answer takes too long, and whatever goes wrong is a `Score` without a value and with a reason: the run
goes on, and the completion is left out of what is learned.
"""

import json
import math
import re
import selectors
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import IO, Any, Protocol

import regex

from megascratch.align import reward_worker
from megascratch.errors import ConfigError, MegascratchError, Problem

_START_S = 120.0  # a module may import much
_MOST_HANGS = 3  # of a rollout: other ranks wait for this one, and a collective that waits too long ends the run
_LONGEST_ANSWER = 1 << 20
_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?<=\d)(?:[eE][-+]?\d+)?")


@dataclass(frozen=True)
class Answered:
    """A completion, and what it answers.

    Attributes:
        prompt, completion: texts.
        record: the prompt's, as it stands in the data; its `answer` is what verifiers compare with.
    """

    prompt: str
    completion: str
    record: Mapping[str, Any]


@dataclass(frozen=True)
class Score:
    """A reward, or NaN and the reason why there is none."""

    value: float
    reason: str = ""


class Reward(Protocol):
    """Gives every completion its score."""

    name: str

    def __call__(self, answers: Sequence[Answered]) -> list[Score]: ...

    def close(self) -> None:
        """Let go of what it holds."""
        ...


class RewardError(MegascratchError):
    """A reward could not be computed, and the recipe asks to end then."""


def _missing(reason: str) -> Score:
    return Score(math.nan, reason)


class Verifier:
    """A reward that is computed here, from completion and answer alone.

    Args:
        name: of the metric.
        verify: returns a score; may raise TimeoutError.
        needs_answer: whether a record without an answer has no score.
    """

    def __init__(self, name: str, verify: Callable[[Answered], float], needs_answer: bool) -> None:
        self.name, self.verify, self.needs_answer = name, verify, needs_answer

    def __call__(self, answers: Sequence[Answered]) -> list[Score]:
        return [self._score(answered) for answered in answers]

    def close(self) -> None:
        pass

    def _score(self, answered: Answered) -> Score:
        if self.needs_answer and answered.record.get("answer") is None:
            return _missing("the record has no answer")
        try:
            return Score(self.verify(answered))
        except TimeoutError:
            return _missing("the pattern took too long")


def number_verifier(name: str = "number") -> Verifier:
    """Return the verifier of numbers."""
    return Verifier(name, lambda a: float(_is_answer(last_number(a.completion), a.record["answer"])), True)


def last_number(text: str) -> Decimal | None:
    """Return the last number of a text, or None: "so 1,200.50 in all." → 1200.50."""
    found = [match for match in _NUMBER.findall(text[-_LONGEST_ANSWER:]) if match]
    return Decimal(found[-1].replace(",", "")) if found else None


def _is_answer(number: Decimal | None, answer: Any) -> bool:
    try:
        wanted = Decimal(str(answer).strip().replace(",", ""))
    except InvalidOperation:
        wanted_number = last_number(str(answer))  # a worked solution, which ends with it
        if wanted_number is None:
            return False
        wanted = wanted_number
    return number is not None and number == wanted


def regex_verifier(pattern: str, timeout_s: float, name: str = "regex") -> Verifier:
    """Return the verifier of a pattern.

    Raises: ConfigError: if it is no regular expression.
    """
    try:
        compiled = regex.compile(pattern)
    except regex.error as error:
        raise ConfigError(Problem(f"pattern = {pattern}", f"is no regular expression: {error}")) from None
    compares = "answer" in compiled.groupindex

    def verify(answered: Answered) -> float:
        match = compiled.search(answered.completion, timeout=timeout_s)
        if match is None or not compares:
            return float(match is not None)
        found = match["answer"]
        return float(found is not None and found.strip() == str(answered.record["answer"]).strip())

    return Verifier(name, verify, compares)


class FunctionReward:
    """A Python function in a process of its own.

    Args:
        target: `module:function`; modules are also looked for in `folder`.
        timeout_s: longest that a call may take.
        folder: the recipe's, or that of the command.
        name: of the metric; the function's when left out.

    Raises: ConfigError: if there is no such function.
    """

    def __init__(self, target: str, timeout_s: float, folder: Path = Path(), name: str | None = None) -> None:
        module, colon, function = target.partition(":")
        if not (module and colon and function):
            raise ConfigError(Problem(f"function = {target}", "must have the form module:function"))
        self.target, self.timeout_s, self.name = target, timeout_s, name or function
        self._hello = {"path": [str(folder.resolve()), *sys.path], "module": module, "function": function}
        self._process: subprocess.Popen[bytes] | None = None
        self._hangs = 0
        self._start()

    def __call__(self, answers: Sequence[Answered]) -> list[Score]:
        self._hangs = 0
        return [self._score(answered) for answered in answers]

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, reward_worker.__file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        answer = self._ask(self._hello, _START_S)
        if "ready" not in answer:
            self.close()
            raise ConfigError(Problem(f"function = {self.target}", f"cannot be used: {answer['error']}"))

    def _score(self, answered: Answered) -> Score:
        if self._hangs >= _MOST_HANGS:
            return _missing(f"not asked: the function took too long {_MOST_HANGS} times")
        request = {"prompt": answered.prompt, "completion": answered.completion, "record": dict(answered.record)}
        if self._process is None:
            self._start()
        answer = self._ask(request, self.timeout_s)
        if "error" in answer:
            return _missing(str(answer["error"]))
        value = float(answer["reward"])
        return Score(value) if math.isfinite(value) else _missing(f"returned {value}")

    def _ask(self, request: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        """Return the process's answer; a process that gives none is ended."""
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(request, default=str).encode() + b"\n")
            process.stdin.flush()
            line = _line(process.stdout, timeout_s)
        except TimeoutError:
            self.close()
            self._hangs += 1
            return {"error": f"took longer than {timeout_s:g} s"}
        except BrokenPipeError:
            line = b""
        if not line:
            self.close()
            return {"error": "ended the process"}
        answer: dict[str, Any] = json.loads(line)
        return answer


def _line(stream: IO[bytes], timeout_s: float) -> bytes:
    """Read a line; the answers are short, so one that has begun comes at once."""
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        if not selector.select(timeout_s):
            raise TimeoutError
    return stream.readline()
