"""Chat templates: what `transformers` renders, whom the words belong to, and templates that mean harm."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import transformers

from megascratch.errors import DataError, TokenizerError
from megascratch.tokenizer import Tokenizer
from megascratch.tokenizer.chat import PRESETS, ChatTemplate

# Written for this test in the manner of the published ones: the same constructs, other words.
CHATML_SYSTEM = """\
{% if messages[0]['role'] != 'system' %}
<|im_start|>system
You help.<|im_end|>
{% endif %}
{% for message in messages %}
    {{- '<|im_start|>' ~ message.role ~ '\\n' ~ message.content | trim ~ '<|im_end|>\\n' -}}
{% endfor %}
{% if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' -}}
{% endif %}"""
LLAMA3 = """\
{{- bos_token }}
{%- set ns = namespace(system='') %}
{%- if messages[0]['role'] == 'system' %}
    {%- set ns.system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nCutting knowledge: never\\n\\n' ~ ns.system ~ '<|eot_id|>' }}
{%- if tools is not none %}
    {{- '<|start_header_id|>user<|end_header_id|>\\n\\n' }}
    {%- for tool in tools %}{{- tool | tojson(indent=4) ~ '\\n' }}{%- endfor %}
    {{- '<|eot_id|>' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.tool_calls is defined %}
        {%- if message.tool_calls | length != 1 %}{{- raise_exception('one call at a time') }}{%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
        {{- '{"name": "' ~ call.name ~ '", "parameters": ' }}{{- call.arguments | tojson }}{{- '}<|eot_id|>' }}
    {%- elif message.role in ['tool', 'ipython'] %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' }}
        {%- if message.content is mapping or message.content is iterable and message.content is not string %}
            {{- message.content | tojson }}
        {%- else %}{{- message.content }}{%- endif %}
        {{- '<|eot_id|>' }}
    {%- else %}
        {{- '<|start_header_id|>' ~ message['role'] ~ '<|end_header_id|>\\n\\n' ~ message['content'] | trim }}
        {{- '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""
MISTRAL = """\
{%- if messages[0]['role'] == 'system' %}{%- set first = messages[0]['content'] %}{%- set turns = messages[1:] %}
{%- else %}{%- set first = '' %}{%- set turns = messages %}{%- endif %}
{{- bos_token }}
{%- for message in turns %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must take turns') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {%- if loop.first and first %}{{- '[INST] ' + first + '\\n\\n' + message['content'] + ' [/INST]' }}
        {%- else %}{{- '[INST] ' + message['content'] + ' [/INST]' }}{%- endif %}
    {%- elif message['role'] == 'assistant' %}
        {{- ' ' + message['content'] + eos_token }}
    {%- else %}{{- raise_exception('only user and assistant') }}{%- endif %}
{%- endfor %}
"""
QWEN3 = """\
{%- set ns = namespace(last=-1) %}
{%- for message in messages %}{%- if message.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}{%- set content = message.content %}
    {%- else %}{%- set content = '' %}{%- endif %}
    {%- if message.role == 'assistant' %}
        {%- set thought = '' %}
        {%- if '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last %}{{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}{%- endif %}
        {% generation %}{{- content + '<|im_end|>\\n' }}{% endgeneration %}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""
GEMMA = """\
{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}{% set role = 'model' %}\
{% else %}{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\\n' }}\
{% if message['content'] is string %}{{ message['content'] | trim }}{% else %}{% for item in message['content'] %}\
{% if item['type'] == 'image' %}{{ '<image>' }}{% continue %}{% endif %}{{ item['text'] | trim }}{% endfor %}\
{% endif %}{{ '<end_of_turn>\\n' }}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}"""

TEMPLATES = {"chatml": CHATML_SYSTEM, "llama3": LLAMA3, "mistral": MISTRAL, "qwen3": QWEN3, "gemma": GEMMA}
TEMPLATES |= {f"preset {name}": source for name, source in PRESETS.items()}
SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "a & b <'>", "parameters": {"é": [1, None]}}}]

USER, ANSWER = {"role": "user", "content": " Hi <there> & 'you'  "}, {"role": "assistant", "content": "Hello!\n"}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "question": [USER],
    "answered": [USER, ANSWER],
    "two turns": [USER, ANSWER, {"role": "user", "content": "é 漢 😀"}, {"role": "assistant", "content": "Bye.\n\n"}],
    "system": [{"role": "system", "content": "Be brief. "}, USER, ANSWER],
    "thoughts": [USER, {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nHello!"}],
    "none": [USER, {"role": "assistant", "content": "Hello", "tool_calls": None, "name": None}],
}


@pytest.fixture(scope="module")
def oracle() -> transformers.PreTrainedTokenizerFast:
    import tokenizers

    empty = tokenizers.Tokenizer(tokenizers.models.BPE())
    return transformers.PreTrainedTokenizerFast(tokenizer_object=empty, **SPECIAL_TOKENS)


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_transformers_renders_the_same(
    name: str, conversation: str, oracle: transformers.PreTrainedTokenizerFast
) -> None:
    messages = CONVERSATIONS[conversation]
    ours = ChatTemplate({"default": TEMPLATES[name]}, SPECIAL_TOKENS)
    for prompt in (False, True):
        for options in ({}, {"tools": TOOLS}, {"enable_thinking": False}):
            arguments: dict[str, Any] = {"add_generation_prompt": prompt, **options}
            theirs = oracle.apply_chat_template(messages, chat_template=TEMPLATES[name], tokenize=False, **arguments)
            assert ours.render(messages, **arguments) == theirs


def test_tools_and_parts_render_the_same(oracle: transformers.PreTrainedTokenizerFast) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1.5, "b": "<é>"}}}
    messages = [USER, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": {"sum": [1, None]}}]
    parts = [{"role": "user", "content": [{"type": "text", "text": " See "}, {"type": "image"}]}, ANSWER]
    for source, chat in ((LLAMA3, messages), (GEMMA, parts)):
        theirs = oracle.apply_chat_template(chat, chat_template=source, tokenize=False, tools=TOOLS)
        assert ChatTemplate({"default": source}, SPECIAL_TOKENS).render(chat, tools=TOOLS) == theirs


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "qwen3"])
def test_spans_of_the_assistant(name: str) -> None:
    template = ChatTemplate({"default": TEMPLATES[name]}, SPECIAL_TOKENS)
    text, spans = template.render_with_spans(CONVERSATIONS["two turns"])
    assert text == template.render(CONVERSATIONS["two turns"])
    said = [text[start:stop] for start, stop in spans]
    assert [words.strip()[:4] for words in said] == ["Hell", "Bye."]
    assert all("Hi" not in words and "assistant" not in words and "model" not in words for words in said)
    ends = {"llama3": "<|eot_id|>", "mistral": "</s>", "gemma": "<end_of_turn>", "plain": "</s>"}
    assert all(ends.get(name.removeprefix("preset "), "<|im_end|>") in words for words in said)


def test_spans_that_no_prefix_shows() -> None:
    template = ChatTemplate({"default": QWEN3})
    text, [(start, stop)] = template.render_with_spans(CONVERSATIONS["thoughts"])
    assert text[start:stop] == "<think>\nHm.\n</think>\n\nHello!<|im_end|>\n"
    with pytest.raises(TokenizerError, match=r"the conversation up to 1\s+is rendered differently when more messages"):
        template.render_with_spans(CONVERSATIONS["two turns"])
    silent = ChatTemplate({"default": "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"})
    with pytest.raises(TokenizerError, match=r"message 1\s+leaves no text of the assistant's"):
        silent.render_with_spans([USER, ANSWER])
    with pytest.raises(DataError, match="has no assistant message"):
        template.render_with_spans([USER])
    with pytest.raises(DataError, match=r"message 0\s+is the assistant's"):
        template.render_with_spans([ANSWER])


def test_files_of_transformers(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """What either writes the other reads, whichever way the templates are kept."""
    sources = {"default": CHATML_SYSTEM, "tool_use": LLAMA3}
    tokenizer.save(tmp_path)
    ChatTemplate(sources, SPECIAL_TOKENS).save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    assert theirs.chat_template == sources
    assert (theirs.bos_token, theirs.eos_token) == ("<s>", "</s>")
    ours = ChatTemplate.from_folder(tmp_path)
    assert (ours.sources, ours.special_tokens) == (sources, SPECIAL_TOKENS)
    assert ours.render([USER], tools=TOOLS) == theirs.apply_chat_template([USER], tools=TOOLS, tokenize=False)
    assert ours.render([USER], template="tool_use") == ours.render([USER], tools=None, template="tool_use")
    for one_template, in_files in ((True, True), (True, False), (False, True), (False, False)):
        theirs.chat_template = CHATML_SYSTEM if one_template else sources
        folder = tmp_path / f"{one_template}{in_files}"
        theirs.save_pretrained(folder, save_jinja_files=in_files)
        assert ChatTemplate.from_folder(folder).sources == ({"default": CHATML_SYSTEM} if one_template else sources)


def test_saving_replaces_the_template_of_a_configuration(tmp_path: Path) -> None:
    config = {"chat_template": "old", "bos_token": {"content": "<b>"}, "kept": 1}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert ChatTemplate.from_folder(tmp_path).render([USER]) == "old"
    assert ChatTemplate.preset("llama3", {"bos_token": "<b>"}).save(tmp_path) == [tmp_path / "chat_template.jinja"]
    assert json.loads((tmp_path / "tokenizer_config.json").read_text()) == {"bos_token": "<b>", "kept": 1}
    assert ChatTemplate.from_folder(tmp_path).render([USER]).startswith("<b><|start_header_id|>user")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has no chat template: neither chat_template.jinja nor"),
        ({"tokenizer_config.json": "{"}, "is not JSON"),
        ({"tokenizer_config.json": "[]"}, "must hold an object"),
        ({"tokenizer_config.json": '{"chat_template": 5}'}, "must be a template, or a list of names"),
        ({"tokenizer_config.json": '{"chat_template": [{"name": "a"}]}'}, "must be a template, or a list of names"),
        ({"tokenizer_config.json": '{"chat_template": {"../a": ""}}'}, r"named '../a'\s+must be letters"),
        ({"chat_template.jinja": "{% for %}"}, "chat template default, line 1  is not a template of Jinja"),
        ({"chat_template.jinja": "{{ x | nosuch }}"}, "No filter named 'nosuch'"),
        ({"chat_template.jinja": b"\xff"}, "is not UTF-8"),
    ],
)
def test_folders_that_cannot_be_used(tmp_path: Path, files: dict[str, str | bytes], message: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(TokenizerError, match=message):
        ChatTemplate.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("source", "messages", "message"),
    [
        (MISTRAL, [ANSWER], r"the conversation\s+is refused by the chat template: roles must take turns"),
        (MISTRAL, [], r"the conversation\s+holds no message"),
        (MISTRAL, ["Hi"], r"message 0\s+must be an object"),
        (MISTRAL, [{"content": "Hi"}], r"message 0\s+must have a role"),
        (MISTRAL, [{"role": "user", "content": object()}], r"message 0\s+holds a object"),
        (MISTRAL, [{"role": "user", "content": b"Hi"}], r"message 0\s+holds a bytes"),
    ],
)
def test_malformed_conversations(source: str, messages: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        ChatTemplate({"default": source}, SPECIAL_TOKENS).render(messages)


def test_conversations_nested_without_end() -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(DataError, match="is nested more than 64 deep"):
        ChatTemplate.preset("chatml").render([{"role": "user", "content": endless}])


HOSTILE = {
    "attributes": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
    "globals": ("{{ raise_exception.__globals__['json'] }}", "SecurityError"),
    "changes": ("{{ messages.append(1) }}", "SecurityError"),
    "broken": ("{{ messages[0].content.nosuch.more }}", "UndefinedError"),
    "types": ("{{ messages[0].content + 1 }}", "TypeError"),
    "range": ("{% for i in range(10000000) %}{% endfor %}", "OverflowError"),
    "loops": ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "more than 0.2 s"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    "times": ("{{ 'a' * 999999999 }}", "more than 16,777,216 characters"),
    "lists": ("{{ [1] * 999999999 }}", "more than 16,777,216 characters"),
    "power": ("{{ 9 ** 99999999 }}", "a number over 1,048,576"),
    "doubling": (
        "{% set n = namespace(x='aaaa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "more than 16,777,216 characters",
    ),
    "adding": (
        "{% set n = namespace(x='aaaa') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
        "more than 16,777,216 characters",
    ),
    "replacing": (
        "{% set n = namespace(x='aaaa') %}{% for i in range(60) %}{% set n.x = n.x.replace('a', n.x) %}{% endfor %}",
        "more than 16,777,216 characters",
    ),
    "filter": (
        "{% set n = namespace(x='aaaa') %}{% for i in range(60) %}{% set n.x = n.x | replace('a', n.x) %}{% endfor %}",
        "more than 16,777,216 characters",
    ),
    "joining": (
        "{% set n = namespace(x='aaaa') %}{% for i in range(60) %}{% set n.x = n.x.join(n.x) %}{% endfor %}",
        "more than 16,777,216 characters",
    ),
    "joining large ones": ("{{ (['a' * 999999] * 999) | join }}", "more than 16,777,216 characters"),
    "joining made ones": ("{{ (['a' * 999999] * 999) | map('upper') | join('-') }}", "more than 16,777,216 characters"),
    "indenting": ("{{ ('a\\n' * 99999) | indent(99999) }}", "more than 16,777,216 characters"),
    "tabs": ("{{ ('a\\t' * 99999).expandtabs(99999) }}", "more than 16,777,216 characters"),
    "indented json": ("{{ messages | tojson(indent=999999) }}", "indents by more than 64"),
    "writing": ("{% for i in range(9999) %}{{ 'aaaa' * 9999 }}{% endfor %}", "writes more than 16,777,216"),
    "widths": ("{{ 'a'.ljust(999999999) }}", "a number over 1,048,576"),
    "centred": ("{{ 'a' | center(999999999) }}", "a number over 1,048,576"),
    "formats": ("{{ '%0999999999d' % 1 }}", "a width that is too large"),
    "format method": ("{{ '{:999999999}'.format(1) }}", "a width that is too large"),
    "format argument": ("{{ '{:{w}}'.format(1, w=999999999) }}", "a number over 1,048,576"),
    "format filter": ("{{ '%999999999d' | format(1) }}", "a width that is too large"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_are_stopped(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source, message = HOSTILE[name]
    monkeypatch.setattr("megascratch.tokenizer.chat_sandbox.MAX_SECONDS", 0.2 if name == "loops" else 10.0)
    start = time.monotonic()
    with pytest.raises(TokenizerError, match=message):
        ChatTemplate({"default": source}).render([USER])
    assert time.monotonic() - start < 5


def test_filters_do_what_jinja_s_do() -> None:
    source = (
        "{{ messages | map(attribute='role') | join(', ') }} {{ messages | join('-', attribute='role') }} "
        "{{ '+'.join(['a', 'b']) }} {{ 'aba'.replace('a', 'xx') }} {{ 'aba' | replace('a', 'xx', 1) }} "
        "{{ 'a\\nb' | indent(2) }} {{ 'a\\nb' | indent('>') }} {{ '%s=%3d' | format('n', 7) }} "
        "{{ '{:>4}'.format('x') }}"
    )
    expected = "user, assistant user-assistant a+b xxbxx xxba a\n  b a\n>b n=  7    x"
    assert ChatTemplate({"default": source}).render([USER, ANSWER]) == expected


def test_unknown_names() -> None:
    with pytest.raises(TokenizerError, match=r"chat template alpaca\s+must be one of chatml, llama3, plain"):
        ChatTemplate.preset("alpaca")
    with pytest.raises(TokenizerError, match=r"chat template rag\s+must be one of default"):
        ChatTemplate.preset("plain").render([USER], template="rag")
