"""What a tokenizer knows, as plain values: tokens, merges, added tokens, and how text is cut before merging.

Readers (`hugging_face`, `tiktoken_ranks`) and the trainer make one; `Tokenizer` runs it; writers take it apart again.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megascratch.errors import Problem, TokenizerError
from megascratch.tokenizer.alphabet import to_characters
from megascratch.tokenizer.cutting import Cut, Normalization, Spaces
from megascratch.tokenizer.patterns import well_formed

END_OF_DOCUMENT = "<|endoftext|>"
MAX_IDS = 1 << 24  # 16.8 million, 60 times the largest vocabulary in use: refuses a file made to exhaust memory

# Looked for in this order where nothing else says which token ends a document.
_USUAL_ENDS = (END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>", "<|eot_id|>", "<|im_end|>")


@dataclass(frozen=True)
class AddedToken:
    """A string with an id of its own, found in the text before anything is cut or merged.

    Args:
        special: a control token. It is recognised in text only on request, so that nobody's text can end a document.
            One that is not special is ordinary vocabulary and always recognised.
        single_word: not recognised inside a word.
        lstrip, rstrip: swallows the white space before it, after it.
        normalized: looked for after the text has been normalised, and its content with it.
    """

    id: int
    content: str
    special: bool = True
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False


@dataclass(frozen=True, eq=False)
class Characters:
    """What a vocabulary has beside tokens and merges if the merges run over characters, as SentencePiece's do.

    Its tokens are UTF-8 text with ▁ for a space; a character without a token becomes the tokens of its bytes.

    Args:
        byte_ids: id of the token that stands for each byte, [256].
        spaces: how spaces become ▁; None where `normalizer` has done it.
        strip_first: decoding takes one space away from the front, which encoding has put there.
        user_defined: ids of pieces taken whole wherever they stand in normalised text.
    """

    byte_ids: tuple[int, ...]
    spaces: Spaces | None = None
    strip_first: bool = True
    user_defined: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)  # arrays have no single equality
class Vocabulary:
    """A BPE vocabulary, whose merges run over bytes, or over characters with bytes to fall back on.

    Args:
        tokens: bytes of each id, [vocab_size]; b"" where an id belongs to an added token or to nothing.
        merges: left id, right id, merged id, rank; int32 [merges, 4], by ascending rank. Of the adjacent pairs in a
            piece, the one of the smallest rank merges first, the leftmost among equals.
        added: added tokens, by ascending id.
        pattern: regular expression of the pre-tokeniser, in the syntax of the `regex` package.
        whole_first: a piece that is a token as a whole is taken as that, whatever the merges make of it
            (`ignore_merges` in Hugging Face's format; what tiktoken does).
        normalizer: what is done to the text before it is cut, such as "NFC", which composes its characters (Qwen);
            only the normalised text comes back on decoding.
        cuts, prefix_space, byte_cuts: steps around the pattern, see `cutting.PreTokenizer`.
        characters: for merges over characters; then no pattern cuts.
        post_processor: what Hugging Face's format says about tokens to put around a text, which encoding does on
            request only (`add_special_tokens`).
        end_of_document: content of the added token that separates documents, or None.
    """

    tokens: Sequence[bytes]
    merges: NDArray[np.int32]
    added: tuple[AddedToken, ...]
    pattern: str
    whole_first: bool = False
    normalizer: tuple[Normalization, ...] = ()
    cuts: tuple[Cut, ...] = ()
    prefix_space: bool = False
    byte_cuts: tuple[Cut, ...] = ()
    characters: Characters | None = None
    post_processor: dict[str, Any] | None = None
    end_of_document: str | None = None

    def __post_init__(self) -> None:
        problems = []
        ids: dict[int, str] = {}
        contents = set()
        for token in self.added:
            if not token.content or token.content != well_formed(token.content):
                rule = "must be text that UTF-8 can write, and not empty"
                problems.append(Problem(f"added token with id {token.id}", rule))
            if token.content in contents:
                problems.append(Problem(f"added token {token.content!r}", "is given twice"))
            elif token.id in ids:
                problems.append(
                    Problem(f"added token {token.content!r}", f"shares id {token.id} with {ids[token.id]!r}")
                )
            contents.add(token.content)
            ids[token.id] = token.content
        if missing := set(range(256)) - {token[0] for token in self.tokens if len(token) == 1}:
            problems.append(
                Problem(
                    f"{len(missing)} of the 256 single bytes",
                    f"are not in the vocabulary, the first is 0x{min(missing):02x}",
                    "only a vocabulary with all of them can encode any text",
                )
            )
        if self.end_of_document is not None and self.end_of_document not in contents:
            problems.append(
                Problem(f"end-of-document token {self.end_of_document!r}", "is not in the vocabulary", self._choices())
            )
        if problems:
            raise TokenizerError(problems)

    def _choices(self) -> str:
        contents = [token.content for token in self.added if token.special]
        return f"use {', '.join(contents[:8])}" if contents else "this tokenizer has no special tokens"


def usual_end_of_document(added: Iterable[AddedToken]) -> str | None:
    """Guess which token ends a document: one of the usual names, else the only special token, else None."""
    special = [token.content for token in added if token.special]
    for name in _USUAL_ENDS:
        if name in special:
            return name
    return special[0] if len(special) == 1 else None


def keys_of(vocabulary: Vocabulary) -> dict[str, int]:
    """Return the `vocab` mapping of Hugging Face's format: tokens in the byte alphabet, added tokens as they are.

    A vocabulary over characters has its tokens as text, and <0x0A> for the one that stands for the byte 10.

    Raises: TokenizerError: if an added token is written as an ordinary token is; the format has one name for one id.
    """
    if vocabulary.characters is None:
        keys = {to_characters(token): id for id, token in enumerate(vocabulary.tokens) if token}
    else:
        names = {id: byte_name(byte) for byte, id in enumerate(vocabulary.characters.byte_ids)}
        keys = {names.get(id) or token.decode(): id for id, token in enumerate(vocabulary.tokens) if token}
    for token in vocabulary.added:
        if keys.setdefault(token.content, token.id) != token.id:
            raise TokenizerError(
                Problem(
                    f"special token {token.content!r}", "is how tokenizer.json writes an ordinary token", "rename it"
                )
            )
    return keys


def byte_name(byte: int) -> str:
    """Return the name of the token that SentencePiece falls back on for a byte."""
    return f"<0x{byte:02X}>"
