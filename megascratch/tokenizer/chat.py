r"""Chat templates: a conversation written out as the text that a model sees.

    messages            user "Hi"          assistant "Hello!"
    rendered, ChatML    <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n
    assistant spans                                                        └────────────────┘

A template is Jinja, read from and written to the files where Hugging Face has them:

    chat_template.jinja, additional_chat_templates/<name>.jinja     today's
    tokenizer_config.json: "chat_template": "..." or [{"name": ..., "template": ...}]     older

What a model is trained to say is found by rendering one prefix of the conversation after another, never by trusting the
template's own marks: most published templates have none, and would train on nothing.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError

from megascratch.errors import DataError, Problem, TokenizerError
from megascratch.tokenizer.chat_sandbox import MAX_CHARACTERS, ChatEnvironment, OutOfBounds, Refused
from megascratch.tokenizer.hugging_face import CONFIG_NAME
from megascratch.tokenizer.tokenizer import write_whole

TEMPLATE_NAME = "chat_template.jinja"
OTHERS_NAME = "additional_chat_templates"
_SPECIAL_TOKENS_NAME = "special_tokens_map.json"
_SPECIAL_TOKENS = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_MAX_FILE_BYTES = 1 << 24
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
_MAX_DEPTH = 64

_CHATML = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}
"""
_LLAMA3 = """\
{{- bos_token | default('<|begin_of_text|>') }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}
"""
_PLAIN = """\
{%- for message in messages %}
{{- message['role'] | capitalize + ': ' + message['content'] }}
{%- if message['role'] == 'assistant' %}{{- eos_token | default('') }}{% endif %}
{{- '\\n\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'Assistant: ' }}{% endif %}
"""
PRESETS: Mapping[str, str] = MappingProxyType({"chatml": _CHATML, "llama3": _LLAMA3, "plain": _PLAIN})

Message = Mapping[str, Any]


class ChatTemplate:
    """Renders conversations by the template of a tokenizer.

    Args:
        sources: templates by name; "default" is used unless another is asked for, or "tool_use" if there are tools.
        special_tokens: what templates know as bos_token, eos_token and so on.

    Raises: TokenizerError: if a template is not Jinja, or a name cannot be that of a file.
    """

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, str] | None = None) -> None:
        self.sources = dict(sources)
        self.special_tokens = dict(special_tokens or {})
        self._environment = ChatEnvironment()
        problems = [
            Problem(f"chat template named {name!r}", "must be letters, digits, _, - or .")
            for name in self.sources
            if not _NAME.fullmatch(name)
        ]
        self._templates = {}
        for name, source in self.sources.items():
            try:
                self._templates[name] = self._environment.from_string(source)
            except (TemplateSyntaxError, RecursionError) as error:
                line = getattr(error, "lineno", 0)
                problems.append(Problem(f"chat template {name}, line {line}", f"is not a template of Jinja: {error}"))
        if problems:
            raise TokenizerError(problems)

    @classmethod
    def preset(cls, name: str, special_tokens: Mapping[str, str] | None = None) -> "ChatTemplate":
        """Return one of the presets: chatml, llama3, plain. Raises: TokenizerError: for a name that is not there."""
        if name not in PRESETS:
            raise TokenizerError(Problem(f"chat template {name}", f"must be one of {', '.join(PRESETS)}"))
        return cls({"default": PRESETS[name]}, special_tokens)

    @classmethod
    def from_folder(cls, path: Path) -> "ChatTemplate":
        """Open the templates in a tokenizer's folder.

        Raises: TokenizerError: if there is none, or one cannot be used.
        """
        config = _load_json(path / CONFIG_NAME)
        special_tokens = _special_tokens(_load_json(path / _SPECIAL_TOKENS_NAME)) | _special_tokens(config)
        files = {"default": path / TEMPLATE_NAME} if (path / TEMPLATE_NAME).is_file() else {}
        files |= {file.stem: file for file in sorted((path / OTHERS_NAME).glob("*.jinja"))}
        sources = {name: _read(file) for name, file in files.items()} or _configured(config, path / CONFIG_NAME)
        if not sources:
            rule = f"has no chat template: neither {TEMPLATE_NAME} nor one in {CONFIG_NAME}"
            raise TokenizerError(Problem(str(path), rule, f"use a preset: {', '.join(PRESETS)}"))
        try:
            return cls(sources, special_tokens)
        except TokenizerError as error:
            raise TokenizerError(error.problems, where=str(path)) from None

    def save(self, path: Path) -> list[Path]:
        """Write the templates into a tokenizer's folder, and the special tokens into its `tokenizer_config.json`.

        Templates that the configuration held are taken out: the files are what is read first.

        Returns: the files of templates.
        """
        config = _load_json(path / CONFIG_NAME)
        written = []
        for name, source in self.sources.items():
            file = path / TEMPLATE_NAME if name == "default" else path / OTHERS_NAME / f"{name}.jinja"
            write_whole(file, source.encode())
            written.append(file)
        changed = {key: value for key, value in config.items() if key != "chat_template"} | self.special_tokens
        if changed != config:
            write_whole(path / CONFIG_NAME, json.dumps(changed, ensure_ascii=False, indent=1).encode())
        return written

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        template: str | None = None,
        **extra: Any,
    ) -> str:
        """Write a conversation out.

        Args:
            messages: each with a "role", and what the template reads: "content", "tool_calls", ... A key with the value
                None is as good as absent.
            add_generation_prompt: end with what comes before the assistant's next words.
            tools: JSON schemas of the functions that the model may call.
            template: name of the template.
            extra: further variables for the template, such as documents or enable_thinking.

        Raises: DataError: if the conversation is malformed, or the template refuses it. TokenizerError: if the template
            fails, takes too long or writes too much.
        """
        _check(messages)
        chosen = self._chosen(template, tools is not None)
        variables = {
            **self.special_tokens,
            **{name: _plain(value, name) for name, value in extra.items()},
            "messages": [
                {key: _plain(value, f"message {n}") for key, value in message.items() if value is not None}
                for n, message in enumerate(messages)
            ],
            "tools": None if tools is None else _plain(tools, "tools"),
            "documents": _plain(extra.get("documents"), "documents"),
            "add_generation_prompt": add_generation_prompt,
        }
        self._environment.start_clock()
        try:
            return "".join(self._bounded(self._templates[chosen].generate(variables)))
        except Refused as error:
            raise DataError(Problem("the conversation", f"is refused by the chat template: {error}")) from None
        except (
            TemplateError,
            ArithmeticError,
            LookupError,
            TypeError,
            ValueError,
            AttributeError,
            RecursionError,
        ) as e:
            rule = f"fails on this conversation ({type(e).__name__}: {e})"
            raise TokenizerError(Problem(f"chat template {chosen}", rule)) from None

    def render_with_spans(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None, **extra: Any
    ) -> tuple[str, list[tuple[int, int]]]:
        """Write a conversation out, and say which of its characters are the assistant's.

        Returns: the text, and for each assistant message the characters [start, stop) that it brings about after the
            generation prompt: what the model is to say, the end of its turn included.

        Raises: DataError: as `render`, and if there is no assistant message, or one comes first, where no prompt can
            stand before it. TokenizerError: as `render`, and if the template writes a message differently once others
            follow, or does not write an assistant message at all.
        """
        roles = [message.get("role") for message in messages if isinstance(message, Mapping)]
        if "assistant" not in roles:
            raise DataError(
                Problem("the conversation", "has no assistant message", "there is nothing to learn from it")
            )
        if roles[0] == "assistant":
            raise DataError(Problem("message 0", "is the assistant's", "let the user or the system begin"))
        text = self.render(messages, tools=tools, **extra)
        spans = []
        for n in [n for n, role in enumerate(roles) if role == "assistant"]:
            prompt = self.render(messages[:n], add_generation_prompt=True, tools=tools, **extra)
            said = self.render(messages[: n + 1], tools=tools, **extra)
            for prefix, what in ((prompt, f"the prompt before message {n}"), (said, f"the conversation up to {n}")):
                if not text.startswith(prefix):
                    rule = "is rendered differently when more messages follow"
                    remedy = "end the conversation there, and train on each turn as a conversation of its own"
                    raise TokenizerError(Problem(f"chat template: {what}", rule, remedy))
            if len(said) <= len(prompt):
                raise TokenizerError(Problem(f"chat template: message {n}", "leaves no text of the assistant's"))
            spans.append((len(prompt), len(said)))
        return text, spans

    def _chosen(self, name: str | None, with_tools: bool) -> str:
        wanted = name or ("tool_use" if with_tools and "tool_use" in self._templates else "default")
        if wanted not in self._templates:
            raise TokenizerError(Problem(f"chat template {wanted}", f"must be one of {', '.join(self._templates)}"))
        return wanted

    def _bounded(self, parts: Iterator[str]) -> Iterator[str]:
        n_characters = 0
        for part in parts:
            n_characters += len(part)
            if n_characters > MAX_CHARACTERS:
                raise OutOfBounds(f"it writes more than {MAX_CHARACTERS:,} characters")
            yield part


def _check(messages: Sequence[Any]) -> None:
    problems = []
    if not messages:
        problems.append(Problem("the conversation", "holds no message"))
    for n, message in enumerate(messages):
        if not isinstance(message, Mapping):
            problems.append(Problem(f"message {n}", "must be an object with a role and a content"))
        elif not isinstance(message.get("role"), str):
            problems.append(Problem(f"message {n}", "must have a role", "such as user or assistant"))
    if problems:
        raise DataError(problems)


def _plain(value: Any, what: str, depth: int = 0) -> Any:
    """Return the value as JSON's own types: an object's methods are nothing for a template to call."""
    if depth > _MAX_DEPTH:
        raise DataError(Problem(what, f"is nested more than {_MAX_DEPTH} deep"))
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item, what, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, what, depth + 1) for item in value]
    raise DataError(Problem(what, f"holds a {type(value).__name__}", "give text, numbers, lists and objects"))


def _configured(config: dict[str, Any], file: Path) -> dict[str, str]:
    """Return the templates of a `tokenizer_config.json` by name."""
    found = config.get("chat_template")
    match found:
        case None:
            return {}
        case str():
            return {"default": found}
        case list() if all(isinstance(one, dict) for one in found):
            sources = {one.get("name"): one.get("template") for one in found}
        case dict():
            sources = dict(found)
        case _:
            sources = {None: None}
    if not all(isinstance(name, str) and isinstance(source, str) for name, source in sources.items()):
        raise TokenizerError(
            Problem("chat_template", "must be a template, or a list of names and templates"), str(file)
        )
    return {str(name): str(source) for name, source in sources.items()}


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    tokens = {}
    for key in _SPECIAL_TOKENS:
        value = config.get(key)
        content = value.get("content") if isinstance(value, dict) else value
        if isinstance(content, str):
            tokens[key] = content
    return tokens


def _load_json(file: Path) -> dict[str, Any]:
    """Return an object from a file, {} where there is no file."""
    if not file.is_file():
        return {}
    try:
        loaded = json.loads(_read(file))
    except (ValueError, RecursionError) as error:
        raise TokenizerError(Problem(str(file), f"is not JSON: {error}")) from None
    if not isinstance(loaded, dict):
        raise TokenizerError(Problem(str(file), "must hold an object"))
    return loaded


def _read(file: Path) -> str:
    try:
        if file.stat().st_size > _MAX_FILE_BYTES:
            raise TokenizerError(Problem(str(file), f"is over {_MAX_FILE_BYTES >> 20} MiB", "is this a chat template?"))
        return file.read_text("utf-8")
    except OSError as error:
        raise TokenizerError(Problem(str(file), f"cannot be read: {error.strerror}")) from None
    except UnicodeDecodeError as error:
        raise TokenizerError(Problem(str(file), f"is not UTF-8: {error}")) from None
