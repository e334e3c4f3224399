"""Decode ids one by one, for text that is shown while it is generated.

ids of "né" might be  [n+0xC3] [0xA9]      feed → "n", then "é": never half a character
"""

import codecs

from megascratch.tokenizer.tokenizer import Tokenizer


class StreamDecoder:
    """Gives out text as soon as its characters are complete.

    What it gives out, joined, is what `Tokenizer.decode` makes of all the ids at once; but a space in front stays where
    a SentencePiece vocabulary would drop it, since the ids go on from a prompt.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, id: int) -> str:
        """Take one id; return the characters that it completes, which may be none."""
        return self._decoder.decode(self._tokenizer.token_bytes(id))

    def finish(self) -> str:
        """Return what is left: U+FFFD for a character that was never completed, else nothing."""
        return self._decoder.decode(b"", final=True)
