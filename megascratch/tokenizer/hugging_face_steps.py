"""The steps of a `tokenizer.json` around its model: normaliser, pre-tokeniser, decoder, post-processor.

    Qwen 3       normalizer NFC; pre_tokenizer Split(Regex), ByteLevel(use_regex=false)
    DeepSeek-V3  pre_tokenizer Split, Split, Split, ByteLevel(use_regex=false)
    StarCoder    pre_tokenizer Digits(individual_digits=true), ByteLevel(use_regex=true)
    Llama 2      normalizer Prepend(▁), Replace(" ", ▁); no pre_tokenizer; decoder ends with Strip(" ", 1, 0)
    Mistral      pre_tokenizer Metaspace(prepend_scheme=first, split=false)

What we read is typed (`cutting`), and written again from there: Digits comes back as the Split that it is.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any, get_args

import regex

from megascratch.errors import Problem, TokenizerError
from megascratch.tokenizer.cutting import (
    SPACE,
    WHOLE,
    Cut,
    Normalization,
    Prefix,
    Prepend,
    Replace,
    Spaces,
    UnicodeForm,
    as_we_read_it,
)
from megascratch.tokenizer.patterns import PATTERNS
from megascratch.tokenizer.vocabulary import Vocabulary

Step = dict[str, Any]

_DIGIT = r"\p{N}"
_PUNCTUATION = r"[\p{P}!-/:-@\[-`{-~]"  # Unicode's punctuation, and ASCII's symbols
_SPACES_TO_SENTENCEPIECE = Replace(" ", SPACE)


@dataclass(frozen=True)
class ByteSteps:
    """The pre-tokeniser of a byte-level tokenizer; see `Vocabulary`."""

    cuts: tuple[Cut, ...]
    prefix_space: bool
    pattern: str
    byte_cuts: tuple[Cut, ...]


def read_normalizer(step: Step | None) -> tuple[Normalization, ...]:
    """Return the steps of a `normalizer`. Raises: TokenizerError: if there is one that we do not know."""
    return tuple(_normalization(one) for one in _flat(step, "normalizers"))


def read_byte_steps(step: Step | None) -> ByteSteps:
    """Return the `pre_tokenizer` of a byte-level tokenizer.

    Raises: TokenizerError: if it is not byte-level, or has a step that we do not know.
    """
    steps = _flat(step, "pretokenizers")
    kinds = [one["type"] for one in steps]
    if kinds.count("ByteLevel") != 1:
        rule = "must have one ByteLevel"
        remedy = "only byte-level BPE, and BPE with byte fallback, are supported"
        raise TokenizerError(Problem(f"pre_tokenizer = {' + '.join(kinds) or 'none'}", rule, remedy))
    at = kinds.index("ByteLevel")
    cuts = [_cut(one) for one in steps[:at]]
    prefix_space = bool(steps[at].get("add_prefix_space"))
    pattern = PATTERNS["gpt2"]
    if not steps[at].get("use_regex", True):
        # The last cut is the pattern, where a Splitter does the same: nearly all tokenizers have that cut alone.
        pattern = cuts.pop().pattern if cuts and not prefix_space and _is_plain(cuts[-1]) else WHOLE
    return ByteSteps(tuple(cuts), prefix_space, pattern, tuple(_cut(one) for one in steps[at + 1 :]))


def read_character_steps(
    step: Step | None, normalizer: tuple[Normalization, ...]
) -> tuple[tuple[Cut, ...], Spaces | None]:
    """Return the `pre_tokenizer` of a tokenizer whose merges run over characters: cuts, and how spaces become ▁.

    Raises: TokenizerError: if it has a step that we do not know.
    """
    steps = _flat(step, "pretokenizers")
    spaces = None
    if steps and steps[-1]["type"] == "Metaspace":
        spaces = _spaces(steps.pop())
    cuts = tuple(_cut(one) for one in steps)
    if _SPACES_TO_SENTENCEPIECE in normalizer:
        # Gemma cuts at the spaces which its normaliser has already turned into ▁.
        cuts = tuple(cut for cut in cuts if cut.pattern != regex.escape(" "))
    return cuts, spaces


def read_strip_first(decoder: Step | None, spaces: Spaces | None) -> bool:
    """Return whether the `decoder` takes the first space away. Raises: TokenizerError: if it does what we do not."""
    strip_first = False
    for step in _flat(decoder, "decoders"):
        match step:
            case {"type": "ByteFallback" | "Fuse"} | {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}:
                pass
            case {"type": "Strip", "content": " ", "start": 0 | 1 as start, "stop": 0}:
                strip_first |= start == 1
            case {"type": "Metaspace", "replacement": "▁"}:
                strip_first |= spaces is not None and spaces.prefix != "never"
            case _:
                raise TokenizerError(Problem(f"decoder {_described(step)}", "is not supported with byte fallback"))
    return strip_first


def read_surroundings(post_processor: Step | None) -> tuple[list[int], list[int]]:
    """Return the ids that a `post_processor` puts before and after a single text.

    Raises: TokenizerError: if it does anything else; KeyError and its like where the structure is not there.
    """
    before: list[int] = []
    after: list[int] = []
    for step in _flat(post_processor, "processors"):
        match step["type"]:
            case "ByteLevel":
                pass
            case "BertProcessing" | "RobertaProcessing":
                before.insert(0, step["cls"][1])
                after.append(step["sep"][1])
            case "TemplateProcessing":
                first, last = _template(step)
                before, after = first + before, after + last
            case kind:
                raise TokenizerError(Problem(f"post_processor = {kind}", "is not supported"))
    return before, after


def _template(step: Step) -> tuple[list[int], list[int]]:
    kinds = [next(iter(part)) for part in step["single"]]
    if kinds.count("Sequence") != 1:
        raise TokenizerError(Problem("post_processor: the template for a single text", "must hold the text once"))
    ids = [
        step["special_tokens"][part["SpecialToken"]["id"]]["ids"] if kind == "SpecialToken" else []
        for kind, part in zip(kinds, step["single"])
    ]
    at = kinds.index("Sequence")
    return [*chain.from_iterable(ids[:at])], [*chain.from_iterable(ids[at:])]


def render_normalizer(steps: tuple[Normalization, ...]) -> Step | None:
    """Return the `normalizer`, None for no steps."""
    return _sequence([_render_normalization(step) for step in steps], "normalizers")


def render_pre_tokenizer(vocabulary: Vocabulary) -> Step | None:
    """Return the `pre_tokenizer`."""
    if vocabulary.characters is not None:
        spaces = vocabulary.characters.spaces
        metaspace = [] if spaces is None else [_render_spaces(spaces)]
        return _sequence([*map(_render_cut, vocabulary.cuts), *metaspace], "pretokenizers")
    use_regex = vocabulary.pattern == PATTERNS["gpt2"]
    cuts = [*vocabulary.cuts, *([] if use_regex or vocabulary.pattern == WHOLE else [Cut(vocabulary.pattern)])]
    byte_level = _byte_level(vocabulary.prefix_space, use_regex)
    steps = [*map(_render_cut, cuts), byte_level, *map(_render_cut, vocabulary.byte_cuts)]
    return _sequence(steps, "pretokenizers")


def render_decoder(vocabulary: Vocabulary) -> Step:
    """Return the `decoder`."""
    if vocabulary.characters is None:
        return _byte_level(vocabulary.prefix_space, use_regex=True)
    steps: list[Step] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if vocabulary.characters.strip_first:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


def _flat(step: Step | None, key: str) -> list[Step]:
    """Return the steps that are not sequences of steps, in order."""
    if step is None:
        return []
    if step["type"] != "Sequence":
        return [step]
    return [smaller for one in step[key] for smaller in _flat(one, key)]


def _sequence(steps: Iterable[Step], key: str) -> Step | None:
    steps = list(steps)
    if len(steps) <= 1:
        return steps[0] if steps else None
    return {"type": "Sequence", key: steps}


def _normalization(step: Step) -> Normalization:
    kind = step["type"]
    if kind in get_args(UnicodeForm):
        return kind
    if kind == "Prepend":
        return Prepend(step["prepend"])
    if kind == "Replace":
        pattern, is_expression = _pattern(step["pattern"])
        if is_expression:
            as_we_read_it(pattern)
        return Replace(pattern, step["content"], is_expression)
    rule = f"is not supported, only {', '.join(get_args(UnicodeForm))}, Prepend and Replace are"
    raise TokenizerError(Problem(f"normalizer = {kind}", rule))


def _render_normalization(step: Normalization) -> Step:
    match step:
        case Prepend(content):
            return {"type": "Prepend", "prepend": content}
        case Replace(pattern, content, is_expression):
            return {"type": "Replace", "pattern": {"Regex" if is_expression else "String": pattern}, "content": content}
        case form:
            return {"type": form}


def _cut(step: Step) -> Cut:
    match step["type"]:
        case "Split":
            pattern, is_expression = _pattern(step["pattern"])
            return Cut(
                pattern if is_expression else regex.escape(pattern), step["behavior"], bool(step.get("invert", False))
            )
        case "Digits":
            return Cut(_DIGIT, "Isolated" if step.get("individual_digits") else "Contiguous")
        case "Punctuation":
            return Cut(_PUNCTUATION, step.get("behavior", "Isolated"))
    raise TokenizerError(
        Problem(f"pre_tokenizer = {step['type']}", "is not supported beside Split, Digits, Punctuation and ByteLevel")
    )


def _render_cut(cut: Cut) -> Step:
    return {"type": "Split", "pattern": {"Regex": cut.pattern}, "behavior": cut.behavior, "invert": cut.invert}


def _is_plain(cut: Cut) -> bool:
    """Whether a Splitter cuts in the same way: pieces are the matches, and what lies between them."""
    if as_we_read_it(cut.pattern) != cut.pattern:
        return False
    everything = cut.behavior == "Removed" and cut.invert and cut.pattern in PATTERNS.values()
    return everything or (cut.behavior == "Isolated" and not cut.invert)


def _pattern(pattern: dict[str, str]) -> tuple[str, bool]:
    [(kind, text)] = pattern.items()
    if kind not in ("Regex", "String") or not isinstance(text, str):
        raise TokenizerError(Problem(f"pattern of kind {kind}", "must be a Regex or a String"))
    return text, kind == "Regex"


def _byte_level(prefix_space: bool, use_regex: bool) -> Step:
    return {"type": "ByteLevel", "add_prefix_space": prefix_space, "trim_offsets": True, "use_regex": use_regex}


def _spaces(step: Step) -> Spaces:
    if step["replacement"] != SPACE:
        raise TokenizerError(Problem(f"Metaspace with {step['replacement']!r}", f"must write a space as {SPACE!r}"))
    prefix: Prefix = step.get("prepend_scheme") or ("always" if step.get("add_prefix_space", True) else "never")
    return Spaces(prefix, bool(step.get("split", True)))


def _render_spaces(spaces: Spaces) -> Step:
    return {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": spaces.prefix, "split": spaces.cut}


def _described(step: Step) -> str:
    details = {key: value for key, value in step.items() if key != "type"}
    return f"{step['type']}{details or ''}"
