"""Jinja for chat templates that come from anywhere: sandboxed, and bounded in time and in size.

A template is a program of somebody else's. Jinja's immutable sandbox keeps it from Python's internals and from changing
its inputs; what it may still do is run for ever or fill the memory. So every turn of a loop and every call of a macro
ticks a clock (a statement put into the parsed template), and whatever makes long strings is measured before it runs.

The dialect is that of Hugging Face's `apply_chat_template`: blocks trim the white space around them, loops know `break`
and `continue`, `tojson` does not escape HTML, and there are `raise_exception`, `strftime_now` and `{% generation %}`.
"""

import json
import re
import threading
import time
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import Environment, TemplateError, nodes, pass_environment
from jinja2.ext import Extension
from jinja2.filters import make_attrgetter
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_CHARACTERS = 1 << 24  # 16.8 million: a conversation of that length is no conversation
MAX_SECONDS = 10.0
_MAX_NUMBER = 1 << 20  # as an exponent, a width, a number of repetitions
_MAX_INDENT = 64
_WIDE_FORMAT = re.compile(r"%[^a-zA-Z%]*(\d{6,}|\*)|\{[^{}]*\d{6,}")


class Refused(TemplateError):
    """The template itself refuses the conversation, by `raise_exception`."""


class OutOfBounds(TemplateError):
    """The template takes too long, or makes too much."""


class Generation(Extension):
    """Lets `{% generation %} ... {% endgeneration %}` be: it marks what an assistant says, and changes nothing."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's own protocol)

    def parse(self, parser: Parser) -> nodes.Node:
        """Return the body, in a scope of its own."""
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


class _Measured(NodeTransformer):
    """Puts a tick into each loop and macro, and measures what ~ joins."""

    def _with_tick(self, node: nodes.For | nodes.Macro) -> nodes.Node:
        self.generic_visit(node)
        tick = nodes.Call(nodes.EnvironmentAttribute("tick"), [], [], None, None)
        node.body.insert(0, nodes.ExprStmt(tick).set_lineno(node.lineno))
        return node

    visit_For = visit_Macro = _with_tick

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return nodes.Call(nodes.EnvironmentAttribute("join"), node.nodes, [], None, None).set_lineno(node.lineno)


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """The environment of chat templates."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation])
        self._deadline = threading.local()
        self.globals.update(raise_exception=_refuse, strftime_now=_strftime_now)
        del self.globals["lipsum"]  # random text has no place in a prompt
        self.filters.update({name: self._measured(function) for name, function in self.filters.items()})
        self.filters |= {"tojson": _to_json, "join": _join}

    def start_clock(self) -> None:
        """Give this thread's next rendering its time."""
        self._deadline.at = time.monotonic() + MAX_SECONDS

    def tick(self) -> None:
        """Raise OutOfBounds when the time is over."""
        if time.monotonic() > getattr(self._deadline, "at", float("inf")):
            raise OutOfBounds(f"it takes more than {MAX_SECONDS:g} s")

    def join(self, *parts: object) -> str:
        """What `~` does."""
        texts = list(map(str, parts))
        _check_size(sum(map(len, texts)))
        return "".join(texts)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Measure the operations that make long texts and large numbers."""
        sized = isinstance(left, (str, list, tuple)), isinstance(right, (str, list, tuple))
        if operator == "+" and all(sized):
            _check_size(len(left) + len(right))
        elif operator == "*" and any(sized):
            items, times = (left, right) if sized[0] else (right, left)
            _check_size(len(items) * max(times, 0) if isinstance(times, int) else 0)
        elif operator == "*" or operator == "**":
            _check_numbers([left, right])
        elif operator == "%" and isinstance(left, str):
            _check_format(left)
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, function: Any, *args: Any, **kwargs: Any) -> Any:
        """Measure the methods of strings."""
        owner = getattr(function, "__self__", None)
        if isinstance(owner, str):
            if function.__name__ == "join" and len(args) == 1:
                return _joined(owner, args[0])
            _check_call(function.__name__, [owner, *args, *kwargs.values()])
        return super().call(context, function, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Measure the `format` of strings, which the sandbox has wrapped already."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def measured(*args: Any, **kwargs: Any) -> str:
            _check_call("format", [value.__self__, *args, *kwargs.values()])
            return wrapped(*args, **kwargs)

        return measured

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Measured().visit(super()._parse(source, name, filename))

    def _measured(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a filter that looks at its arguments first."""

        def measured(*args: Any, **kwargs: Any) -> Any:
            self.tick()
            _check_call(function.__name__.removeprefix("do_"), [*args, *kwargs.values()])
            return function(*args, **kwargs)

        measured.__dict__.update(
            getattr(function, "__dict__", {})
        )  # whether Jinja passes its context along stands there
        return measured


def _check_call(name: str, args: list[Any]) -> None:
    """Measure what a method or filter will make; the text that it works on comes first."""
    _check_numbers(args)
    texts = [arg for arg in args if isinstance(arg, str)]
    if name == "replace" and len(texts) > 2:
        _check_size(len(texts[0]) + texts[0].count(texts[1]) * len(texts[2]))
    elif name in ("indent", "expandtabs") and texts:
        widths = [arg if isinstance(arg, int) else len(arg) for arg in args if isinstance(arg, (int, str))][1:]
        lines = texts[0].count("\n") + texts[0].count("\t") + 1
        _check_size(len(texts[0]) + lines * max([8, *widths]))
    elif name == "format" and texts:
        _check_format(texts[0])


def _joined(separator: str, items: Iterable[object]) -> str:
    parts, size = [], 0
    for item in items:
        parts.append(str(item))
        size += len(parts[-1]) + len(separator)
        _check_size(size)
    return separator.join(parts)


@pass_environment
def _join(environment: Environment, value: Iterable[object], d: str = "", attribute: str | int | None = None) -> str:
    """The filter `join`, which measures what its items make."""
    return _joined(str(d), value if attribute is None else map(make_attrgetter(environment, attribute), value))


def _check_size(n: int) -> None:
    if n > MAX_CHARACTERS:
        raise OutOfBounds(f"it makes a text of more than {MAX_CHARACTERS:,} characters")


def _check_numbers(values: list[Any]) -> None:
    if any(isinstance(value, int) and abs(value) > _MAX_NUMBER for value in values):
        raise OutOfBounds(f"it computes with a number over {_MAX_NUMBER:,}")


def _check_format(text: str) -> None:
    if _WIDE_FORMAT.search(text):
        raise OutOfBounds("it formats with a width that is too large")


def _refuse(message: object) -> NoReturn:
    raise Refused(str(message))


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    if indent is not None and indent > _MAX_INDENT:
        raise OutOfBounds(f"it indents by more than {_MAX_INDENT}")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
