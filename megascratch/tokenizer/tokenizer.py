"""`Tokenizer`: text to ids and back, by one `Vocabulary`.

    "Hi <|endoftext|> there"
      added tokens asked for are found first      "Hi "   <|endoftext|>   " there"
      each stretch between is cut into pieces     Hi ␣                    ␣there
      each piece is merged                        [17250, 220]  [50256]   [612]

Exact round trip: `decode_bytes(encode_bytes(data)) == data` for any bytes, and `decode(encode(text)) == text` for any
text that UTF-8 can write. The exceptions are what a vocabulary asks for: a text that it normalises, a space that it
puts in front and leaves there (`prefix_space`), and SentencePiece's ▁, which comes back as a space.
"""

import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Sized
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from megascratch.errors import Problem, TokenizerError
from megascratch.tokenizer import _bpe, _sentencepiece, hugging_face, hugging_face_steps, tiktoken_ranks
from megascratch.tokenizer.added_tokens import AddedTokenFinder
from megascratch.tokenizer.batches import in_batches
from megascratch.tokenizer.cutting import SPACE, CharacterPreTokenizer, PreTokenizer, normalizer, with_spaces
from megascratch.tokenizer.patterns import Pieces, Splitter, finder, pattern_named, well_formed
from megascratch.tokenizer.vocabulary import AddedToken, Vocabulary

Specials = Literal["all"] | Collection[str]
Ids = NDArray[np.int32]

_BATCH_CHARACTERS = 1 << 22  # text split before it is encoded: bounds the memory that a batch takes beside its result


class Tokenizer:
    """A BPE tokenizer, over bytes or, like SentencePiece's with byte fallback, over characters.

    Text that looks like a special token is ordinary text, unless the call allows it: `allowed_special="all"`, or the
    names. (Hugging Face's `tokenizers` always allows all.) `disallowed_special` refuses a text that holds one. Added
    tokens that are not special are always recognised.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self._splitter, self._encoder = _model(vocabulary)
        self._scanning = _scanning(self._splitter, self._encoder)
        self._normalize = normalizer(vocabulary.normalizer)
        self._surroundings = hugging_face_steps.read_surroundings(vocabulary.post_processor)
        self._id_of_added = {token.content: token.id for token in vocabulary.added}
        self._bytes = list(vocabulary.tokens)
        for token in vocabulary.added:
            self._bytes[token.id] = token.content.encode()
        if vocabulary.characters is not None:
            self._bytes = [token.replace(SPACE.encode(), b" ") for token in self._bytes]
        self._decoder = _bpe.Decoder(self._bytes)

    def __reduce__(self) -> tuple[type["Tokenizer"], tuple[Vocabulary]]:
        # Workers of a spawned pool get the vocabulary and build their own tables.
        return type(self), (self.vocabulary,)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], end_of_document: str | None = None) -> "Tokenizer":
        """Open a `tokenizer.json`, or a directory that holds one.

        Args:
            end_of_document: the token that ends a document, where the files do not say or say otherwise.

        Raises: TokenizerError: if there is no such file, or it is not a BPE tokenizer that we can run.
        """
        return cls(hugging_face.read(Path(path), end_of_document))

    @classmethod
    def from_tiktoken(
        cls, path: str | os.PathLike[str], pattern: str, special_tokens: Mapping[str, int]
    ) -> "Tokenizer":
        """Open a `.tiktoken` rank file.

        Args:
            pattern: name of the pre-tokeniser's pattern, such as cl100k.
            special_tokens: ids of the special tokens by content; the file does not hold them.

        Raises: TokenizerError: if the file is missing or malformed, or the pattern unknown.
        """
        return cls(tiktoken_ranks.read(Path(path), pattern_named(pattern), special_tokens))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write `tokenizer.json`: to the path itself if it ends in .json, else into that directory with its config.

        Returns: the path of the `tokenizer.json`. It is replaced as a whole: a reader never sees half of it.
        """
        path = Path(path)
        file = path if path.suffix == ".json" else path / hugging_face.FILE_NAME
        text = json.dumps(hugging_face.render(self.vocabulary), ensure_ascii=False, indent=1)
        write_whole(file, text.encode())
        if file != path:
            config = json.dumps(hugging_face.render_config(self.vocabulary), ensure_ascii=False, indent=1)
            write_whole(path / hugging_face.CONFIG_NAME, config.encode())
        return file

    def save_tiktoken(self, path: str | os.PathLike[str]) -> None:
        """Write a `.tiktoken` rank file.

        Raises: TokenizerError: if tiktoken would encode differently with it; see `tiktoken_ranks.render`.
        """
        write_whole(Path(path), tiktoken_ranks.render(self.vocabulary))

    @property
    def vocab_size(self) -> int:
        """One more than the highest id: the rows that an embedding needs."""
        return len(self._bytes)

    @property
    def special_tokens(self) -> dict[str, int]:
        """Ids of the special tokens by content."""
        return {token.content: token.id for token in self.vocabulary.added if token.special}

    @property
    def eod_id(self) -> int | None:
        """Id of the token that ends a document; None when the vocabulary has none."""
        end = self.vocabulary.end_of_document
        return None if end is None else self._id_of_added[end]

    @property
    def cut_by_regex(self) -> bool:
        """Whether Python's `regex` cuts the text, some twenty times slower than the scanners of the named patterns."""
        return self._scanning is None and self.vocabulary.characters is None

    def token_bytes(self, id: int) -> bytes:
        """Return the bytes that an id decodes to. Raises: TokenizerError: for an id outside the vocabulary."""
        if not 0 <= id < self.vocab_size:
            raise self._unknown(id)
        return self._bytes[id]

    def byte_lengths(self) -> Ids:
        """Bytes of text that each id stands for, int32 [vocab_size]; 0 for special tokens, which stand for none.

        Dividing a loss by the sum of these gives bits per byte, comparable between tokenizers.
        """
        lengths = np.array([len(token) for token in self._bytes], np.int32)
        lengths[list(self.special_tokens.values())] = 0
        return lengths

    def encode(
        self,
        text: str,
        *,
        allowed_special: Specials = (),
        disallowed_special: Specials = (),
        add_special_tokens: bool = False,
    ) -> list[int]:
        """Encode one text.

        Args:
            allowed_special: special tokens to recognise in the text, "all" or names.
            disallowed_special: special tokens that the text must not hold, "all" or names; allowed ones excepted.
            add_special_tokens: put the vocabulary's own tokens around the text, such as Llama's beginning of text. Not
                done unless asked: documents are joined by the end-of-document token, and a chat template writes out
                whatever a conversation begins with.

        Returns: ids. A lone surrogate, which UTF-8 cannot write, is encoded as U+FFFD.

        Raises: TokenizerError: if the text holds a disallowed special token, or an option names an unknown one.
        """
        [ids] = self.encode_batch(
            [text],
            allowed_special=allowed_special,
            disallowed_special=disallowed_special,
            add_special_tokens=add_special_tokens,
        )
        return ids.tolist()

    def encode_batch(
        self,
        texts: Iterable[str],
        threads: int = 1,
        *,
        allowed_special: Specials = (),
        disallowed_special: Specials = (),
        add_special_tokens: bool = False,
    ) -> list[Ids]:
        """Encode many texts; options and errors are those of `encode`.

        Args:
            threads: threads that encode; the GIL is free meanwhile.

        Returns: int32 [tokens] for each text.
        """
        _check_threads(threads)
        find = self._finder(allowed_special, disallowed_special)
        encoded: list[Ids] = []
        for batch in in_batches(texts, _BATCH_CHARACTERS):
            stretches = [find(well_formed(text)) for text in batch]
            flat = [(part, n == 0) for parts in stretches for n, part in enumerate(parts) if isinstance(part, str)]
            encoded += _regroup(stretches, self._encode_stretches(flat, threads))
        if add_special_tokens and any(self._surroundings):
            before, after = (np.array(ids, np.int32) for ids in self._surroundings)
            encoded = [np.concatenate([before, ids, after]) for ids in encoded]
        return encoded

    def encode_documents(
        self, text: bytes | memoryview | NDArray[np.uint8], ends: NDArray[np.int64], threads: int = 1
    ) -> tuple[NDArray[np.uint32] | NDArray[np.uint16], NDArray[np.int64]]:
        """Encode many documents that lie end to end in one buffer of UTF-8: the shortest way from bytes to ids.

        Args:
            text: bytes, or a contiguous view of some, such as of a memory map.
            ends: byte offset at which each document ends, int64 [documents]; the last is the size of the text.
            threads: threads that encode, on shares of the text; the GIL is free meanwhile.

        Returns: (ids, ends): the ids of all documents end to end, uint16 where all ids of the vocabulary fit and uint32
            otherwise; and how many there are up to the end of each document, int64 [documents]. A document's ids are
            those of `encode`; bytes that are not UTF-8 are encoded as what they are.

        Raises: TokenizerError: if there is no thread. ValueError: if the ends decrease, or do not reach the text's end.
        """
        _check_threads(threads)
        narrow = self.vocab_size <= 1 << 16
        if self._scanning and not self.vocabulary.normalizer and all(token.special for token in self.vocabulary.added):
            scanner, encoder = self._scanning
            encode = encoder.encode_documents_16 if narrow else encoder.encode_documents
            return encode(scanner, text, ends, threads)
        data = text if isinstance(text, bytes) else text.tobytes()
        starts = [0, *ends.tolist()]
        documents = (data[begin:end].decode("utf-8", "replace") for begin, end in pairwise(starts))
        encoded = self.encode_batch(documents, threads)
        ids = np.concatenate([np.empty(0, np.int32), *encoded])
        return ids.astype(np.uint16) if narrow else ids.view(np.uint32), _ends(encoded)

    def encode_bytes(self, data: bytes) -> list[int]:
        """Encode bytes that need not be UTF-8; those that are get the ids that `encode` gives.

        Only bytes: no added token is recognised, and nothing is normalised but SentencePiece's spaces.
        """
        text = data.decode("utf-8", "surrogateescape")
        if self.vocabulary.characters is not None:
            text = self._normalize(text)
        [ids] = self._encode_stretches([(text, True)], threads=1)
        return ids.tolist()

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Decode to text; bytes that are not UTF-8 become U+FFFD.

        Args:
            skip_special: leave special tokens out.

        Raises: TokenizerError: for an id outside the vocabulary.
        """
        if skip_special:
            special = set(self.special_tokens.values())
            ids = [id for id in ids if id not in special]
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Decode to the exact bytes. Raises: TokenizerError: for an id outside the vocabulary."""
        try:
            data = self._decoder.decode(ids if isinstance(ids, np.ndarray) else np.fromiter(ids, np.int64))
        except IndexError as error:
            raise self._unknown(str(error)) from None
        characters = self.vocabulary.characters
        return data.removeprefix(b" ") if characters is not None and characters.strip_first else data

    def _unknown(self, id: object) -> TokenizerError:
        rule = f"must be from 0 to {self.vocab_size - 1}"
        return TokenizerError(Problem(f"token id {id}", rule, "is this the right tokenizer?"))

    def _encode_stretches(self, stretches: Sequence[tuple[str, bool]], threads: int) -> list[Ids]:
        """Encode normalised stretches of text, each with whether a text begins with it → int32 [tokens] each."""
        if not stretches:
            return []
        ids: NDArray[np.uint32] | Ids
        if self._scanning:
            scanner, encoder = self._scanning
            utf8 = [text.encode("utf-8", "surrogateescape") for text, _ in stretches]
            ids, id_ends = encoder.encode_documents(scanner, b"".join(utf8), _ends(utf8), threads)
        else:
            pieces = [self._split(text, at_start) for text, at_start in stretches]
            offsets = [0, *_ends([one.utf8 for one in pieces])[:-1]]
            ends = np.concatenate([one.ends + offset for one, offset in zip(pieces, offsets)])
            document_ends = _ends([one.ends for one in pieces])
            utf8 = [one.utf8 for one in pieces]
            ids, id_ends = self._encoder.encode(b"".join(utf8), ends, document_ends, threads)
        ids = ids.view(np.int32)
        return [ids[begin:end] for begin, end in pairwise([0, *id_ends.tolist()])]  # np.split takes a microsecond each

    def _split(self, text: str, at_start: bool) -> Pieces:
        """Cut a normalised stretch of text; `at_start` says that a text begins with it."""
        characters = self.vocabulary.characters
        if characters is not None and characters.spaces is not None:
            text = with_spaces(text, characters.spaces, at_start)
        return self._splitter.split(text)

    def _finder(self, allowed: Specials, disallowed: Specials) -> Callable[[str], list[str | AddedToken]]:
        """Return a function that cuts a text at the added tokens to recognise, and refuses those disallowed."""
        special = {token.content for token in self.vocabulary.added if token.special}
        recognised = _chosen(allowed, special)
        wanted = [token for token in self.vocabulary.added if not token.special or token.content in recognised]
        added_tokens = AddedTokenFinder(wanted, self._normalize)
        refused = finder(_chosen(disallowed, special) - recognised)

        def find(text: str) -> list[str | AddedToken]:
            if refused is not None and (match := refused.search(text)):
                raise TokenizerError(
                    Problem(f"{match[0]!r} in the text", "is a special token", "allow it with allowed_special")
                )
            return added_tokens.find(text)

        return find


def _model(
    vocabulary: Vocabulary,
) -> tuple[Splitter | PreTokenizer | CharacterPreTokenizer, _bpe.Encoder | _sentencepiece.CharacterEncoder]:
    """Return what cuts text, and what merges the pieces."""
    characters = vocabulary.characters
    if characters is not None:
        texts = list(vocabulary.tokens)
        for id in characters.byte_ids:
            texts[id] = b""  # a byte's token is no character's
        cut_spaces = characters.spaces is not None and characters.spaces.cut
        return CharacterPreTokenizer(vocabulary.cuts), _sentencepiece.CharacterEncoder(
            texts, vocabulary.merges, characters.byte_ids, characters.user_defined, cut_spaces
        )
    encoder = _bpe.Encoder(vocabulary.tokens, vocabulary.merges, vocabulary.whole_first)
    if vocabulary.cuts or vocabulary.prefix_space or vocabulary.byte_cuts:
        steps = vocabulary.cuts, vocabulary.prefix_space, vocabulary.pattern, vocabulary.byte_cuts
        return PreTokenizer(*steps), encoder
    return Splitter(vocabulary.pattern), encoder


def _scanning(
    splitter: Splitter | PreTokenizer | CharacterPreTokenizer, encoder: _bpe.Encoder | _sentencepiece.CharacterEncoder
) -> tuple[str, _bpe.Encoder] | None:
    """Return the scanner and encoder that go over whole documents at once; None where Python has to cut them."""
    if isinstance(splitter, Splitter) and splitter.scanner is not None and isinstance(encoder, _bpe.Encoder):
        return splitter.scanner, encoder
    return None


def _check_threads(threads: int) -> None:
    if threads < 1:
        raise TokenizerError(Problem(f"threads = {threads}", "must be at least 1"))


def _ends(parts: Sequence[Sized]) -> NDArray[np.int64]:
    """Where each part ends when they lie end to end."""
    return np.cumsum([len(part) for part in parts], dtype=np.int64)


def _chosen(names: Specials, special: set[str]) -> set[str]:
    if names == "all":
        return special
    if unknown := [name for name in names if name not in special]:
        raise TokenizerError([Problem(f"special token {name!r}", "is not in the vocabulary") for name in unknown])
    return set(names)


def _regroup(stretches: Sequence[Sequence[str | AddedToken]], merged: Sequence[Ids]) -> Iterator[Ids]:
    """Put the ids of added tokens back between those of the stretches of text around them."""
    remaining = iter(merged)
    for parts in stretches:
        arrays = [np.array([p.id], np.int32) if isinstance(p, AddedToken) else next(remaining) for p in parts]
        yield arrays[0] if len(arrays) == 1 else np.concatenate([np.empty(0, np.int32), *arrays])


def write_whole(file: Path, content: bytes) -> None:
    """Replace a file as a whole, making its directory where there is none."""
    partial = file.with_name(file.name + ".tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        partial.replace(file)
    except OSError as error:
        problem = Problem(str(file), f"cannot be written: {error.strerror}", "choose another place")
        raise TokenizerError(problem) from None
