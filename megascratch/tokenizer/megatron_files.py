"""`vocab.json` and `merges.txt`: GPT-2's own two files, which Megatron's GPT2BPETokenizer reads.

    vocab.json   {"!": 0, ..., "Ġthe": 262, ..., "<|endoftext|>": 50256}
    merges.txt   #version: 0.2
                 Ġ t
                 Ġt he

The cut is GPT-2's, and <|endoftext|> ends a document; the files say neither, so no other tokenizer fits into them.
"""

import json
from pathlib import Path

from megascratch.errors import Problem, TokenizerError
from megascratch.tokenizer.hugging_face import parse
from megascratch.tokenizer.patterns import PATTERNS
from megascratch.tokenizer.vocabulary import END_OF_DOCUMENT, Vocabulary, keys_of

VOCAB_NAME = "vocab.json"
MERGES_NAME = "merges.txt"
_MAX_FILE_BYTES = 1 << 27
_FIRST_LINE = "#version: 0.2"


def read(vocab_file: Path, merge_file: Path) -> Vocabulary:
    """Read the two files.

    Raises: TokenizerError: if one is missing or malformed, or has no <|endoftext|>.
    """
    vocab, lines = _read(vocab_file), _read(merge_file).split("\n")
    try:
        ids = json.loads(vocab)
        end = {"id": ids[END_OF_DOCUMENT], "content": END_OF_DOCUMENT, "special": True}
        merges = [line for n, line in enumerate(lines) if line and not (n == 0 and line.startswith("#version"))]
        model = {"type": "BPE", "vocab": ids, "merges": merges}
        return parse({"model": model, "pre_tokenizer": {"type": "ByteLevel"}, "added_tokens": [end]})
    except TokenizerError as error:
        raise TokenizerError(error.problems, where=f"{vocab_file} and {merge_file}") from None
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        rule = f"is not GPT-2's vocab.json: {type(error).__name__}: {error}"
        raise TokenizerError(Problem(str(vocab_file), rule, f"or {merge_file} is not its merges.txt")) from None


def render(vocabulary: Vocabulary) -> tuple[bytes, bytes]:
    """Return what `vocab.json` and `merges.txt` hold.

    Raises: TokenizerError: if Megatron would encode differently with them.
    """
    problems = _unsayable(vocabulary)
    if problems:
        raise TokenizerError(
            [Problem("this tokenizer", f"cannot be written as vocab.json and merges.txt: {why}") for why in problems]
        )
    keys = keys_of(vocabulary)
    names = {id: name for name, id in keys.items()}
    merges = [f"{names[left]} {names[right]}" for left, right, _, _ in vocabulary.merges.tolist()]
    return json.dumps(keys, ensure_ascii=False).encode(), "\n".join([_FIRST_LINE, *merges, ""]).encode()


def _unsayable(vocabulary: Vocabulary) -> list[str]:
    """Return what the vocabulary does, and the two files have no words for."""
    steps = (vocabulary.normalizer, vocabulary.cuts, vocabulary.prefix_space, vocabulary.byte_cuts)
    checks = {
        "its merges run over characters": vocabulary.characters is not None,
        "it is not cut by GPT-2's pattern alone": vocabulary.pattern != PATTERNS["gpt2"] or any(steps),
        "it takes whole pieces before merging": vocabulary.whole_first,
        f"its one added token must be {END_OF_DOCUMENT}": [t.content for t in vocabulary.added] != [END_OF_DOCUMENT],
    }
    return [reason for reason, holds in checks.items() if holds]


def _read(file: Path) -> str:
    try:
        if file.stat().st_size > _MAX_FILE_BYTES:
            raise TokenizerError(Problem(str(file), f"is over {_MAX_FILE_BYTES >> 20} MiB", "is this a tokenizer?"))
        return file.read_text("utf-8")
    except OSError as error:
        raise TokenizerError(Problem(str(file), f"cannot be read: {error.strerror}", "check the path")) from None
    except UnicodeDecodeError as error:
        raise TokenizerError(Problem(str(file), f"is not UTF-8: {error}")) from None
