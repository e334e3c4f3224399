"""Open a tokenizer of any format that we know, and write one in any.

    a directory      tokenizer.json, else tokenizer.model, else vocab.json and merges.txt
    *.json           tokenizer.json by another name; vocab.json is taken with the merges.txt beside it
    *.model          SentencePiece's; or a rank file by that name, as Llama 3's was published
    *.tiktoken, *.bpe    a rank file: pattern and special tokens have to be given, or the pattern guessed

`guess_pattern` knows a rank file's pattern by what its tokens are: each is a part of one piece of text.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from megascratch.errors import Problem, TokenizerError
from megascratch.tokenizer import hugging_face, megatron_files, sentencepiece, tiktoken_ranks
from megascratch.tokenizer.patterns import PATTERNS, Splitter, pattern_named
from megascratch.tokenizer.tokenizer import Tokenizer, write_whole

FORMATS = ("hf", "tiktoken", "megatron", "sentencepiece")
MODEL_NAME = "tokenizer.model"
_RANK_SUFFIXES = (".tiktoken", ".bpe")
_PROBE = "getElementById XMLHttpRequest isNotEmpty 1234567 I'll :\n\n  \r\n  x12 //\n if(a){\n\t\treturn 2024;}"
_ENOUGH_WORDS = 20_000
_FEW = 0.005  # a few tokens look like several pieces when they stand alone


def open_tokenizer(
    path: Path,
    pattern: str | None = None,
    special_tokens: Mapping[str, int] | None = None,
    end_of_document: str | None = None,
) -> Tokenizer:
    """Open the tokenizer in a file or directory.

    Args:
        pattern: name of the pattern of a rank file; guessed where it is left out.
        special_tokens: ids of a rank file's special tokens by content.
        end_of_document: the token that ends a document, where the files do not say or say otherwise.

    Raises: TokenizerError: if there is no tokenizer, or none that we can run.
    """
    if path.is_dir():
        path = _in_directory(path)
    is_ranks = path.suffix in _RANK_SUFFIXES or (path.suffix == ".model" and not sentencepiece.is_model(path))
    if is_ranks and path.is_file():
        ranks = tiktoken_ranks.read_ranks(path)
        expression = pattern_named(pattern) if pattern else PATTERNS[guess_pattern(list(ranks), path)]
        return Tokenizer(tiktoken_ranks.vocabulary_of(ranks, expression, special_tokens or {}, path, end_of_document))
    if pattern or special_tokens:
        rule = "belongs to a rank file (.tiktoken): other formats have their own"
        raise TokenizerError(Problem("pattern, special tokens", rule, "leave it out"), str(path))
    if is_ranks:
        raise TokenizerError(Problem(str(path), "cannot be read: No such file", "correct the path"))
    if path.suffix == ".model":
        return Tokenizer(sentencepiece.read(path, end_of_document))
    if path.name == megatron_files.VOCAB_NAME:
        return Tokenizer(megatron_files.read(path, path.with_name(megatron_files.MERGES_NAME)))
    return Tokenizer(hugging_face.read(path, end_of_document))


def is_tokenizer(path: Path) -> bool:
    """Say whether a path looks like a tokenizer of a format that we know."""
    if path.is_dir():
        return _in_directory(path).is_file()
    return path.is_file() and path.suffix in (".json", ".model", *_RANK_SUFFIXES)


def _in_directory(path: Path) -> Path:
    for name in (hugging_face.FILE_NAME, MODEL_NAME, megatron_files.VOCAB_NAME):
        if (path / name).is_file():
            return path / name
    return path / hugging_face.FILE_NAME


def guess_pattern(tokens: Sequence[bytes], path: Path) -> str:
    """Return the name of the pattern that a vocabulary was trained with.

    A token is what merges made inside one piece, so the right pattern leaves it whole. Where several leave the same
    number whole, it is the one that cuts the most: only a vocabulary without GPT-2's long numbers fits into GPT-4's.
    GPT-4 and Llama 3 differ at the end of a text alone, which no token shows; Llama 3's file is named `.model`.

    Raises: TokenizerError: if no pattern fits, or several do.
    """
    words = [text for token in tokens if len(token) > 1 and (text := _text(token))]
    words = words[:: 1 + len(words) // _ENOUGH_WORDS]

    def misfit(name: str) -> tuple[int, int]:
        splitter = Splitter(PATTERNS[name])
        return sum(len(splitter.split(word).ends) > 1 for word in words), -len(splitter.split(_PROBE).ends)

    misfits = {name: misfit(name) for name in PATTERNS}
    least = min(misfits.values())
    fitting = [name for name in PATTERNS if misfits[name] == least]
    if path.suffix == ".model" and "llama3" in fitting:
        fitting = ["llama3"]
    if not words or least[0] > _FEW * len(words):
        rule = "does not say its pattern, and none that we know fits"
        raise TokenizerError(Problem(str(path), rule, f"name one of {', '.join(PATTERNS)}"))
    if len({PATTERNS[name] for name in fitting}) > 1:
        rule = "does not say its pattern, and several fit"
        raise TokenizerError(Problem(str(path), rule, f"name {' or '.join(fitting)}"))
    return fitting[0]


def _text(token: bytes) -> str:
    try:
        return token.decode()
    except UnicodeDecodeError:
        return ""  # a part of a character says nothing


def write(tokenizer: Tokenizer, format: str, path: Path) -> list[Path]:
    """Write a tokenizer.

    Args:
        format: hf (a .json file, or a directory for `tokenizer.json`), tiktoken (a rank file), megatron (a directory
            for `vocab.json` and `merges.txt`) or sentencepiece (a .model file).

    Returns: the files.

    Raises: TokenizerError: if the format cannot say what the tokenizer does.
    """
    match format:
        case "hf":
            tokenizer.save(path)
        case "tiktoken":
            tokenizer.save_tiktoken(path)
        case "megatron":
            contents = megatron_files.render(tokenizer.vocabulary)
            for file, content in zip(files_of(format, path), contents):
                write_whole(file, content)
        case "sentencepiece":
            write_whole(path, sentencepiece.render(tokenizer.vocabulary))
        case _:
            raise TokenizerError(Problem(f"format {format}", f"must be one of {', '.join(FORMATS)}"))
    return files_of(format, path)


def files_of(format: str, path: Path) -> list[Path]:
    """Return the files that writing in a format makes or replaces."""
    if format == "hf" and path.suffix != ".json":
        return [path / hugging_face.FILE_NAME]
    if format == "megatron":
        return [path / megatron_files.VOCAB_NAME, path / megatron_files.MERGES_NAME]
    return [path]
