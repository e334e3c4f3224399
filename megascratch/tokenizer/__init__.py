"""Byte-level BPE: train, encode, decode, and exchange with Hugging Face, tiktoken, SentencePiece and Megatron.

`Tokenizer` is what the rest of the system uses; `train` makes one from files, `train_from_texts` from any texts.
`ChatTemplate` writes conversations out as text.
"""

from megascratch.tokenizer.chat import ChatTemplate
from megascratch.tokenizer.patterns import PATTERNS
from megascratch.tokenizer.streaming import StreamDecoder
from megascratch.tokenizer.tokenizer import Tokenizer
from megascratch.tokenizer.training import train, train_from_texts
from megascratch.tokenizer.vocabulary import END_OF_DOCUMENT, AddedToken, Vocabulary

__all__ = [
    "END_OF_DOCUMENT",
    "PATTERNS",
    "AddedToken",
    "ChatTemplate",
    "StreamDecoder",
    "Tokenizer",
    "Vocabulary",
    "train",
    "train_from_texts",
]
