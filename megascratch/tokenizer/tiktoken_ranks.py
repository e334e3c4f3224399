"""`.tiktoken` rank files: one token a line, its bytes in base64 and its rank, which is also its id.

    IQ== 0
    Ig== 1
    ...
    IHRoZQ== 262        " the"

There are no merges in the file. tiktoken joins any two neighbours that together spell a token, lowest rank first; as
merges, that is every split of every token into two tokens. The pattern and the special tokens stand in no file at all
and have to be given.
"""

import base64
import binascii
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megascratch.errors import Problem, TokenizerError
from megascratch.tokenizer import _bpe
from megascratch.tokenizer.vocabulary import MAX_IDS, AddedToken, Vocabulary, usual_end_of_document

_MAX_FILE_BYTES = 1 << 28
_MAX_TOKEN_BYTES = 4096  # the splits of a token cost its length squared


def read(path: Path, pattern: str, special_tokens: Mapping[str, int]) -> Vocabulary:
    """Read a rank file.

    Args:
        pattern: regular expression of the pre-tokeniser.
        special_tokens: ids of the special tokens by content.

    Raises: TokenizerError: if the file is missing or malformed, or an id is taken twice.
    """
    return vocabulary_of(read_ranks(path), pattern, special_tokens, path)


def vocabulary_of(
    ids: Mapping[bytes, int],
    pattern: str,
    special_tokens: Mapping[str, int],
    path: Path,
    end_of_document: str | None = None,
) -> Vocabulary:
    """Build the vocabulary of the ranks in a file; arguments and errors as for `read`."""
    tokens = [b""] * (max([*ids.values(), *special_tokens.values()], default=-1) + 1)
    for token, id in ids.items():
        tokens[id] = token
    taken = [name for name, id in special_tokens.items() if tokens[id]]
    if taken or len(set(special_tokens.values())) < len(special_tokens):
        raise TokenizerError(
            [Problem(f"special token {name} = {special_tokens[name]}", "has the id of a token") for name in taken]
            or Problem("special tokens", "must have different ids"),
            where=str(path),
        )
    added = tuple(sorted((AddedToken(id, name) for name, id in special_tokens.items()), key=lambda token: token.id))
    return Vocabulary(
        tokens=tokens,
        merges=_splits(ids),
        added=added,
        pattern=pattern,
        whole_first=True,
        end_of_document=end_of_document or usual_end_of_document(added),
    )


def render(vocabulary: Vocabulary) -> bytes:
    """Return the rank file of a vocabulary.

    Raises: TokenizerError: if tiktoken would encode differently with it. It does not where the merges run in the order
        of the ids and each token is what its own bytes encode to: then neighbours that spell a token have always come
        about by that token's own merge. Every vocabulary that training yields is so.
    """
    ids = {token: id for id, token in enumerate(vocabulary.tokens) if token}
    if not np.array_equal(vocabulary.merges, _splits(ids)):
        if (np.diff(vocabulary.merges[:, 2]) <= 0).any():
            raise _not_ranks("its merges do not run in the order of its ids")
        if unreachable := _unreachable(vocabulary):
            raise _not_ranks(f"its token {unreachable[0]!r} is not what its own bytes encode to")
    return b"".join(b"%s %d\n" % (base64.b64encode(token), id) for token, id in ids.items())


def read_ranks(path: Path) -> dict[bytes, int]:
    """Return the rank of each token in a file. Raises: TokenizerError: if the file is missing or malformed."""
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise TokenizerError(Problem(str(path), f"is over {_MAX_FILE_BYTES >> 20} MiB", "is this a rank file?"))
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise TokenizerError(Problem(str(path), f"cannot be read: {error.strerror}", "correct the path")) from None
    ids: dict[bytes, int] = {}
    for number, line in enumerate(lines, 1):
        try:
            encoded, rank = line.split()
            token, id = base64.b64decode(encoded, validate=True), int(rank)
        except (ValueError, binascii.Error):
            problem = Problem(f"line {number}", "must be a token in base64, a space, and its rank")
            raise TokenizerError(problem, where=str(path)) from None
        if token in ids or not 0 < len(token) <= _MAX_TOKEN_BYTES or not 0 <= id < MAX_IDS:
            problem = Problem(f"line {number}", f"must be a new token of 1 to {_MAX_TOKEN_BYTES} bytes and a rank ≥ 0")
            raise TokenizerError(problem, where=str(path))
        ids[token] = id
    if len(set(ids.values())) < len(ids):
        raise TokenizerError(Problem("a rank", "is given to two tokens"), where=str(path))
    return ids


def _splits(ids: Mapping[bytes, int]) -> np.ndarray[Any, np.dtype[np.int32]]:
    rows = [
        (ids[token[:cut]], ids[token[cut:]], id, id)
        for token, id in sorted(ids.items(), key=lambda item: item[1])
        for cut in range(1, len(token))
        if token[:cut] in ids and token[cut:] in ids
    ]
    return np.array(rows, np.int32).reshape(-1, 4)


def _unreachable(vocabulary: Vocabulary) -> list[bytes]:
    tokens = [token for token in vocabulary.tokens if token]
    encoder = _bpe.Encoder(vocabulary.tokens, vocabulary.merges, whole_first=False)
    ends = np.cumsum([len(token) for token in tokens])
    pieces = np.arange(1, len(tokens) + 1)
    _, id_ends = encoder.encode(b"".join(tokens), ends, pieces, 1)
    return [token for token, n_ids in zip(tokens, np.diff(id_ends, prepend=0)) if n_ids != 1]


def _not_ranks(reason: str) -> TokenizerError:
    return TokenizerError(
        Problem("this tokenizer", f"cannot be written as tiktoken ranks: {reason}", "export it as tokenizer.json")
    )
